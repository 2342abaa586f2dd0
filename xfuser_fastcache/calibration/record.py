"""Records of generations: what the transformer was given and what it put out, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xfuser_fastcache.calibration.branches import BranchCounter
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.forward_layout import ForwardContract, noise_tokens


@dataclass(frozen=True)
class Trajectory:
    """One branch of one generation.

    Attributes:
        gram: inner products of the outputs of all `T` steps, then of the latents, `(2 T, 2 T)`,
            means over tokens and channels. Every forecast that is linear in them, and its error,
            follows from these.
        skipped: at which steps a cache skipped, `(T,)`; what it put out there is not in `gram`, but
            what the model would have.
        errors: relative L2 error of what was put out, `(T,)`; 0 where nothing was skipped.
    """

    gram: NDArray[np.float64]
    skipped: NDArray[np.bool_]
    errors: NDArray[np.float64]


@dataclass
class _Branch:
    rows: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


class Recorder:
    """Records the generations that run while it is entered; the outputs stay as they are.

    On a cached transformer (with `forecaster="output"`) the model is run as well where its output
    was forecast, and the error noted. Of a generation, the latents and outputs of all steps are
    held on the host until it ends, in float32: 8 bytes a token, channel and step; of more than
    `max_tokens` tokens a picture an even selection. Then only the inner products stay: 32 T^2
    bytes.

    Args:
        transformer: whose forward the pipeline calls.
        adapter: of its family.
        max_tokens: tokens of a picture that are recorded (pixels where the latents are a picture).
    """

    def __init__(self, transformer: nn.Module, adapter: type[ModelAdapter], max_tokens: int):
        self.transformer = transformer
        self.max_tokens = max_tokens
        self._contract = ForwardContract()
        self._branches: list[_Branch] = []
        self._counter = BranchCounter(transformer, adapter)
        self._handle: Any = None

    def __enter__(self) -> Recorder:
        self._handle = self.transformer.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def take(self) -> list[Trajectory]:
        """Return the generation that was just recorded, one trajectory a branch, and forget it.

        Raises:
            ValueError: nothing was recorded, or branches of unequal length.
        """
        branches, self._branches = self._branches, []
        self._counter.reset()
        lengths = {len(branch.rows) for branch in branches}
        if len(lengths) != 1:
            raise ValueError(
                f"a generation with branches of {sorted(lengths)} steps cannot be calibrated on: "
                "every branch has to run at every step"
            )
        return [_trajectory(branch) for branch in branches]

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        index = self._counter.of(args, kwargs)
        if index == len(self._branches):
            self._branches.append(_Branch())
        branch = self._branches[index]
        hook, truth = hook_on(module), output
        skipped = hook is not None and hook.engine.decisions.decisions[-1].judgements[0].skip
        if hook is not None and skipped:
            with torch.no_grad():
                truth = hook.fn_ref.original_forward(*args, **kwargs)
        latents = self._contract.read(args, kwargs).hidden_states
        noise = noise_tokens(self._contract.unpack(truth).hidden_states, latents)
        error = 0.0
        if skipped:
            put_out = self._contract.unpack(output).hidden_states
            made = noise_tokens(put_out, latents).double()
            error = float((made - noise).norm() / noise.double().norm())
        rows = (sample(noise, self.max_tokens), sample(latents, self.max_tokens))
        branch.rows.append(tuple(row.float().cpu().reshape(-1).clone() for row in rows))  # type: ignore[arg-type]
        branch.skipped.append(skipped)
        branch.errors.append(error)


def sample(tokens: torch.Tensor, most: int) -> torch.Tensor:
    """Return an even selection of at most `most` tokens of `(batch, tokens, channels)`."""
    return tokens[:, :: -(-tokens.shape[1] // most)]


def _trajectory(branch: _Branch) -> Trajectory:
    outputs, latents = zip(*branch.rows, strict=True)
    rows = torch.stack((*outputs, *latents)).double()
    gram = (rows @ rows.T / rows.shape[1]).numpy()
    return Trajectory(gram, np.array(branch.skipped), np.array(branch.errors))

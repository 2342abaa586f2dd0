"""Records of generations: what the transformer was given and what it put out, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xfuser_fastcache.calibration.branches import BranchCounter, contract_of
from xfuser_fastcache.calibration.team import Alone, Team
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.forward_layout import noise_tokens
from xfuser_fastcache.xdit.ranks import Place


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
        entries: steps at which another denoiser has taken over for the rest, which no forecast
            crosses.
    """

    gram: NDArray[np.float64]
    skipped: NDArray[np.bool_]
    errors: NDArray[np.float64]
    entries: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass
class _Branch:
    """What this rank saw of a branch.

    Attributes:
        outputs: of each step, `(batch, tokens, channels)`.
        latents: of each step, same shapes.
        skipped: at which steps a cache skipped.
        errors: of what was put out, and the size of the true output, sums of squares, `(T, 2)`.
        entries: as of `Trajectory`.
    """

    outputs: list[torch.Tensor] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)


class Recorder:
    """Records the generations that run while it is entered; the outputs stay as they are.

    On a cached transformer (with `forecaster="output"`) the model is run as well where its output
    was forecast, and the error noted. Of a generation, the latents and outputs of all steps are
    held on the host until it ends, in float32: 8 bytes a token, channel and step; of more than
    `max_tokens` tokens a picture an even selection. Then only the inner products stay: 32 T^2
    bytes. Ranks that share a picture put their parts together when it is taken.

    Args:
        denoisers: of one pipeline, whose forward it calls.
        adapter: of their family.
        max_tokens: tokens of a picture that are recorded (pixels where the latents are a picture).
        team: whose ranks record it together.
    """

    def __init__(
        self,
        denoisers: Sequence[nn.Module],
        adapter: type[ModelAdapter],
        max_tokens: int,
        team: Team | None = None,
    ):
        self.denoisers = denoisers
        self.max_tokens = max_tokens
        self.team = team or Alone()
        self._contract = contract_of(denoisers[0], adapter, self.team.place.stages)
        self._branches: list[_Branch] = []
        self._counter = BranchCounter(denoisers, adapter)
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        self._handles = [
            denoiser.register_forward_hook(self._record, with_kwargs=True)
            for denoiser in self.denoisers
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[Trajectory]:
        """Return the generation that was just recorded, one trajectory a branch, and forget it.

        The ranks that share the picture call it together.

        Raises:
            ValueError: nothing was recorded, or branches of unequal length.
        """
        branches, self._branches = self._branches, []
        self._counter.reset()
        lengths = {len(branch.skipped) for branch in branches}
        if len(lengths) != 1:
            raise ValueError(
                f"a generation with branches of {sorted(lengths)} steps cannot be calibrated on: "
                "every branch has to run at every step"
            )
        return [self._trajectory(branch) for branch in branches]

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        place, (patch, _) = self.team.place, self.team.patch()
        # Under PipeFusion all guidance of a step comes in one call, or on other ranks.
        index = 0
        if place.stages == 1:
            _, index, takes_over = self._counter.of(module, args, kwargs)
        if index == len(self._branches):
            self._branches.append(_Branch())
        branch = self._branches[index]
        if place.stages == 1 and takes_over:
            branch.entries.append(len(branch.skipped))
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
            error = float((made - noise).square().sum())
        if place.stage == 0:
            self._keep(branch.latents, latents, patch)
        if place.stage == place.stages - 1:
            self._keep(branch.outputs, noise, patch)
        if patch == 0:
            branch.skipped.append(skipped)
            branch.errors.append((error, float(noise.double().square().sum())))

    def _keep(self, rows: list[torch.Tensor], tokens: torch.Tensor, patch: int) -> None:
        place = self.team.place
        if place.stages == 1:
            tokens = sample(tokens, self.max_tokens, place)
        kept = tokens.float().cpu().clone()
        if patch:
            rows[-1] = torch.cat((rows[-1], kept), dim=1)
        else:
            rows.append(kept)

    def _trajectory(self, branch: _Branch) -> Trajectory:
        latents = self.team.of_picture(branch.latents, 0)
        outputs = self.team.of_picture(branch.outputs, self.team.place.stages - 1)
        # A last stage does not know how many of the channels are noise.
        rows = [*(made[..., : latents[0].shape[-1]] for made in outputs), *latents]
        kept = [sample(row, self.max_tokens).reshape(-1) for row in rows]
        matrix = torch.stack(kept).double()
        gram = (matrix @ matrix.T / matrix.shape[1]).numpy()
        errors, sizes = self.team.summed(np.array(branch.errors)).T
        entries = np.array(branch.entries, np.int64)
        return Trajectory(gram, np.array(branch.skipped), np.sqrt(errors / sizes), entries)


def sample(tokens: torch.Tensor, most: int, place: Place | None = None) -> torch.Tensor:
    """Return an even selection of at most `most` tokens of a picture.

    Args:
        tokens: `(batch, tokens, channels)`.
        most: of the whole picture.
        place: of the rank, whose tokens are one of several equal parts; None for all of them.
    """
    shard, shards = (place.shard, place.shards) if place else (0, 1)
    count = tokens.shape[1]
    stride = -(-count * shards // most)
    return tokens[:, -shard * count % stride :: stride]

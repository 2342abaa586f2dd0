"""Corrections for one mask of steps, fitted so that each step leads back to the full run.

A forecast that is nearest to the model's output need not make the nearest picture: errors of
several skipped steps add up, and the model answers to where they have led. So a batch of
generations is run with the mask, and at each step the weights are those with which the
scheduler's next latents come nearest to what full computation had there. The next step
starts from where these weights have led, and mends what they left. A computed step mends most: its
output, beside what was extrapolated, says what the forecasts before it were wrong by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xfuser_fastcache.calibration.cells import ridge_weights
from xfuser_fastcache.calibration.record import sample
from xfuser_fastcache.calibration.team import Alone, Team
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.models.forward_layout import ForwardContract, noise_tokens
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory

# Largest relative residual of a scheduler that counts as linear.
LINEAR = 1e-3
# More than cells have: what the fitted pictures were led to is not quite what others will be.
TRAJECTORY_RIDGE = 0.05
# Places of the terms that differ between pictures without and with guidance.
OF_OUTPUTS = [0, 2, 4]


class Observer:
    """Keeps what the transformer is given and puts out while it is entered.

    Args:
        transformer: whose forward the pipeline calls, with all guidance of a step in one call.
        generations: pictures of the batch, `n`; a call holds `k n` of them, those without guidance
            first, as diffusers' pipelines do.
        max_tokens: tokens of a picture that are kept, an even selection.
        team: whose ranks draw the batch together; each sees all of it.

    Attributes:
        latents: of each step so far, `(n, tokens, channels)`, float32.
        outputs: noise predictions of each step so far, `(k, n, tokens, channels)`, float32.
    """

    def __init__(
        self,
        transformer: nn.Module,
        generations: int,
        max_tokens: int,
        team: Team | None = None,
    ):
        self.transformer = transformer
        self.generations = generations
        self.max_tokens = max_tokens
        self.team = team or Alone()
        self.latents: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self._handle: Any = None

    def __enter__(self) -> Observer:
        self._handle = self.transformer.register_forward_hook(self._observe, with_kwargs=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def rows(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return `(k n, tokens, channels)` each as `(k, n, selected tokens, channels)`.

        Of what this rank alone has, the whole; the team's ranks call it together.
        """
        kept = [sample(one, self.max_tokens, self.team.place) for one in tensors]
        shares = self.team.shares(self.generations)
        replicas = [
            [one.unflatten(0, (-1, len(share))) for one in found]
            for found, share in zip(self.team.whole(kept), shares, strict=True)
        ]
        return [torch.cat(parts, dim=1) for parts in zip(*replicas, strict=True)]

    def tokens_at_work(self, count: int) -> slice:
        """Return which tokens of the picture are forecast, given how many: all of them."""
        return slice(None)

    def _observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        latents = ForwardContract().read(args, kwargs).hidden_states
        image = ForwardContract().unpack(output).hidden_states
        given, made = self.rows(latents, noise_tokens(image, latents))
        self.latents.append(given[0].clone())
        self.outputs.append(made.clone())


@dataclass(frozen=True)
class Update:
    """A scheduler's step: next latents as a linear function of what it has seen.

    Attributes:
        latents: weight of the latents.
        outputs: of the noise predictions, `(k,)`: guidance and step size.
        latents_before: of the latents one step before.
        outputs_before: of the noise predictions one step before, `(k,)`.
    """

    latents: float
    outputs: torch.Tensor
    latents_before: float
    outputs_before: torch.Tensor

    def guided(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return what the scheduler makes of `(k, ...)` predictions: one, in their own unit."""
        return torch.tensordot(self.outputs / self.outputs.sum(), outputs, dims=1)


def updates_of(latents: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> list[Update]:
    """Read a scheduler's steps off generations.

    Args:
        latents: of all `T` steps and after the last, `(n, tokens, channels)` each.
        outputs: noise predictions of all steps, `(k, n, tokens, channels)` each.

    Raises:
        ValueError: the scheduler is not linear in them, or looks back further than one step.
    """
    found = []
    for step, made in enumerate(outputs):
        seen = [latents[step], *made]
        if step:
            seen += [latents[step - 1], *outputs[step - 1]]
        columns = torch.stack([x.flatten() for x in seen], dim=1).double().cpu().numpy()
        sizes = np.linalg.norm(columns, axis=0)
        wanted = latents[step + 1].flatten().double().cpu().numpy()
        # Euler's latents follow from those before: of many solutions the smallest is taken.
        weights = np.linalg.lstsq(columns / sizes, wanted, rcond=1e-6)[0] / sizes
        missed = np.linalg.norm(columns @ weights - wanted) / np.linalg.norm(wanted)
        if missed > LINEAR:
            raise ValueError(
                f"the scheduler's step {step} is not linear in latents and noise predictions "
                f"({missed:.1e} of it is not explained), so masks cannot be steered"
            )
        count = len(made)
        weights = np.concatenate((weights, np.zeros(2 * (1 + count) - len(weights))))
        one, before = weights[: 1 + count], weights[1 + count :]
        found.append(
            Update(
                float(one[0]), torch.from_numpy(one[1:]).to(made),
                float(before[0]), torch.from_numpy(before[1:]).to(made),
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class FullRun:
    """A batch of generations with full computation.

    Attributes:
        latents: of all `T` steps and after the last, `(n, tokens, channels)` each.
        outputs: noise predictions, `(k, n, tokens, channels)` each.
        updates: the scheduler's steps.
        fitted: how many of the generations weights are fitted on; the others are held out.
    """

    latents: list[torch.Tensor]
    outputs: list[torch.Tensor]
    updates: list[Update]
    fitted: int

    @classmethod
    def of(cls, observer: Observer, final: torch.Tensor, fitted: int) -> FullRun:
        """Return what an observer saw of a pipeline's run that ended in the latents `final`.

        Raises:
            ValueError: see `updates_of`.
        """
        tokens = ForwardContract().read((final,), {}).hidden_states
        last = sample(tokens, observer.max_tokens).float()
        latents = [*observer.latents, last.to(observer.latents[-1])]
        return cls(latents, observer.outputs, updates_of(latents, observer.outputs), fitted)


class SteeringForecaster(OutputForecaster):
    """Forecasts a batch of generations, and fits its weights on the first of them as it goes.

    It runs in the engine's place of an `OutputForecaster`, on its very terms. With w the weights
    and F the terms, a step minimises the mean over generations of
    ``|guided(target - plain - F w)|^2 / |guided(full output)|^2``, plus a ridge that shrinks to the
    plain output: the extrapolated one, at a computed step that which was computed. The target is
    the output that would take the scheduler from where it is to the full run's next latents.
    By branch, the terms without guidance and those with it are fitted side by side. The latents
    are the same in both, so that their terms have the same weights.

    Args:
        full: the same batch with full computation.
        observer: of this run.
        by_branch: whether pictures without and with guidance have weights of their own; for a
            batch of both.

    Attributes:
        found: the weights, `(T, 5)`, by branch `(T, 2, 5)`; 0 until a step has been skipped.
    """

    depth = 3

    def __init__(self, full: FullRun, observer: Observer, by_branch: bool = False):
        super().__init__()
        self.full = full
        self.observer = observer
        self.by_branch = by_branch
        self._sums = np.zeros(0), np.zeros(0)
        shape = (2, 5) if by_branch else (5,)
        self.found = np.zeros((len(full.outputs), *shape), np.float32)

    def _correct(
        self, plain: Streams, memory: Memory, inputs: Streams, noise_level: float, computed: bool
    ) -> Streams:
        """Fit this step's weights, and return the forecast, or what was computed, with them."""
        terms = self.terms(memory, inputs, computed)
        step, latents = len(self.observer.outputs), inputs.hidden_states
        made = [noise_tokens(x, latents) for x in (plain.hidden_states, *terms)]
        (given, *_), base, *columns = self.observer.rows(latents, *made)
        place = self.observer.team.place
        if not self.by_branch:
            self.found[step] = self._agreed(lambda: self._fit(step, given, base, columns))
            return self.corrected(plain, terms, self.found[step].tolist())
        more = [torch.stack([torch.zeros_like(columns[i][0]), columns[i][1]]) for i in OF_OUTPUTS]
        weights = self._agreed(lambda: self._fit(step, given, base, columns + more))
        common, added = np.split(weights, [len(terms)])
        self.found[step] = common
        self.found[step][1, OF_OUTPUTS] += added
        # Of ranks that share guidance out, each has one of the two.
        rows = [0, 1] if place.branches == 1 else [place.branch]
        own = self.found[step][rows].repeat(len(latents) // len(rows), axis=0)
        each = torch.from_numpy(own).to(latents.device)
        return self.corrected(plain, terms, list(each.unbind(dim=1)))

    def _agreed(self, fit: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return what all ranks that see the batch go by."""
        return self.observer.team.agreed(fit)

    def _fit(
        self, step: int, latents: torch.Tensor, plain: torch.Tensor, terms: list[torch.Tensor]
    ) -> NDArray[np.float32]:
        """Return a step's weights, by the tokens at work and those of the step before them."""
        full, update = self.full, self.full.updates[step]
        at = self.observer.tokens_at_work(latents.shape[1])
        astray = update.latents * (latents - full.latents[step][:, at])
        if step:
            seen, before = self.observer, step - 1
            moved = seen.latents[before] - full.latents[before]
            astray += update.latents_before * moved[:, at]
            made = seen.outputs[before] - full.outputs[before]
            astray += torch.tensordot(update.outputs_before, made[:, :, at], dims=1)
        target = full.outputs[step][:, :, at] - astray / update.outputs.sum()
        size = update.guided(full.outputs[step])[: full.fitted].flatten(1).norm(dim=1)

        def relative(rows: torch.Tensor) -> NDArray[np.float64]:
            guided = update.guided(rows)[: full.fitted].flatten(1) / size[:, None]
            return guided.flatten().double().cpu().numpy()

        columns = np.stack([relative(term) for term in terms], axis=1)
        sums = columns.T @ columns, columns.T @ relative(target - plain)
        if at.start:
            sums = self._sums[0] + sums[0], self._sums[1] + sums[1]
        self._sums = sums
        return ridge_weights(*sums, TRAJECTORY_RIDGE).astype(np.float32)

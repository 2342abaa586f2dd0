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

from xfuser_fastcache.calibration.branches import BranchCounter, Spot, contract_of
from xfuser_fastcache.calibration.cells import ridge_weights
from xfuser_fastcache.calibration.record import sample
from xfuser_fastcache.calibration.team import Alone, Team
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.forward_layout import noise_tokens
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory

# Largest relative residual of a scheduler that counts as linear.
LINEAR = 1e-3
# A scheduler looks back on two steps (UniPC) where less than this share of what one leaves is left.
FURTHER = 0.1
# More than cells have: what the fitted pictures were led to is not quite what others will be.
TRAJECTORY_RIDGE = 0.05
# Places of the terms that differ between pictures without and with guidance.
OF_OUTPUTS = [0, 2, 4]


class Observer:
    """Keeps what the transformer is given and puts out while it is entered.

    Args:
        denoisers: of one pipeline, whose forward it calls.
        adapter: of their family.
        generations: pictures of the batch, `n`; a call holds `k n` of them, those without guidance
            first, as diffusers' pipelines do; or a step has `k` calls of `n`.
        max_tokens: tokens of a picture that are kept, an even selection.
        team: whose ranks draw the batch together; each sees all of it.

    Attributes:
        latents: of each step so far, `(n, tokens, channels)`, float32.
        outputs: noise predictions of each step so far, `(k, n, tokens, channels)`, float32; of the
            step at work, those of its calls so far.
        spot: of the call at work.
        entries: steps at which another denoiser has taken over.
        contract: how their forward passes are read.
    """

    def __init__(
        self,
        denoisers: Sequence[nn.Module],
        adapter: type[ModelAdapter],
        generations: int,
        max_tokens: int,
        team: Team | None = None,
    ):
        self.denoisers = denoisers
        self.generations = generations
        self.max_tokens = max_tokens
        self.team = team or Alone()
        self.latents: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.entries: list[int] = []
        self.spot = Spot(0, 0, takes_over=False)
        self._counter = BranchCounter(denoisers, adapter)
        self.contract = contract_of(denoisers[0], adapter, self.team.place.stages)
        self._handles: list[Any] = []

    def __enter__(self) -> Observer:
        for denoiser in self.denoisers:
            self._handles += [
                denoiser.register_forward_pre_hook(self._open, with_kwargs=True),
                denoiser.register_forward_hook(self._observe, with_kwargs=True),
            ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.spot = self._counter.of(module, args, kwargs)
        if self.spot.takes_over and self.spot.step not in self.entries:
            self.entries.append(self.spot.step)

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
        latents = self.contract.read(args, kwargs).hidden_states
        image = self.contract.unpack(output).hidden_states
        given, made = self.rows(latents, noise_tokens(image, latents))
        if self.spot.step < len(self.outputs):
            self.outputs[-1] = torch.cat((self.outputs[-1], made))
        else:
            self.latents.append(given[0].clone())
            self.outputs.append(made.clone())


@dataclass(frozen=True)
class Update:
    """A scheduler's step: next latents as a linear function of what it has seen.

    Attributes:
        latents: weight of the latents.
        outputs: of the noise predictions, `(k,)`: guidance and step size.
        before: both of one step before, and where the scheduler looks back further of two.
    """

    latents: float
    outputs: torch.Tensor
    before: tuple[tuple[float, torch.Tensor], ...]

    def guided(self, outputs: torch.Tensor, branches: slice = slice(None)) -> torch.Tensor:
        """Return what the scheduler makes of `(k, ...)` predictions: one, in their own unit.

        Args:
            outputs: of these branches.
            branches: of all; the others are left out.
        """
        return torch.tensordot((self.outputs / self.outputs.sum())[branches], outputs, dims=1)


def updates_of(latents: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> list[Update]:
    """Read a scheduler's steps off generations.

    Args:
        latents: of all `T` steps and after the last, `(n, tokens, channels)` each.
        outputs: noise predictions of all steps, `(k, n, tokens, channels)` each.

    Raises:
        ValueError: the scheduler is not linear in them, or looks back further than two steps.
    """
    return [_update(step, latents, outputs) for step in range(len(outputs))]


def _update(step: int, latents: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Update:
    wanted = latents[step + 1].flatten().double().cpu().numpy()
    made = outputs[step]

    def explained(back: int) -> tuple[float, NDArray[np.float64]]:
        """Return what share is missed by looking back so many steps, and the weights."""
        times = range(step, max(step - back, 0) - 1, -1)
        seen = [x.flatten() for at in times for x in (latents[at], *outputs[at])]
        columns = torch.stack(seen, dim=1).double().cpu().numpy()
        sizes = np.linalg.norm(columns, axis=0)
        # Euler's latents follow from those before: of many solutions the smallest is taken.
        weights = np.linalg.lstsq(columns / sizes, wanted, rcond=1e-6)[0] / sizes
        missed = np.linalg.norm(columns @ weights - wanted) / np.linalg.norm(wanted)
        return float(missed), weights

    missed, weights = explained(back=1)
    further, more = explained(back=2)
    if further < FURTHER * missed:
        missed, weights = further, more
    if missed > LINEAR:
        raise ValueError(
            f"the scheduler's step {step} is not linear in latents and noise predictions "
            f"({missed:.1e} of it is not explained), so masks cannot be steered"
        )
    now, *before = (
        (float(one[0]), torch.from_numpy(one[1:].copy()).to(made))
        for one in weights.reshape(-1, 1 + len(made))
    )
    return Update(*now, tuple(before))


@dataclass(frozen=True)
class FullRun:
    """A batch of generations with full computation.

    Attributes:
        latents: of all `T` steps and after the last, `(n, tokens, channels)` each.
        outputs: noise predictions, `(k, n, tokens, channels)` each.
        updates: the scheduler's steps.
        fitted: how many of the generations weights are fitted on; the others are held out.
        entries: steps at which another denoiser has taken over.
        apart: whether guidance's branches are calls that come one after the other.
    """

    latents: list[torch.Tensor]
    outputs: list[torch.Tensor]
    updates: list[Update]
    fitted: int
    entries: tuple[int, ...] = ()
    apart: bool = False

    @classmethod
    def of(cls, observer: Observer, final: torch.Tensor, fitted: int) -> FullRun:
        """Return what an observer saw of a pipeline's run that ended in the latents `final`.

        Raises:
            ValueError: see `updates_of`; or steps that differ in their branches of guidance.
        """
        branches = sorted({len(made) for made in observer.outputs})
        if len(branches) > 1 or branches[-1] > 2:
            raise ValueError(
                f"steps with {branches} branches of guidance: masks are searched where every step "
                "has the same one or two; leave --computed_steps out"
            )
        tokens = observer.contract.layout.tokens(final)
        last = sample(tokens, observer.max_tokens).float()
        latents = [*observer.latents, last.to(observer.latents[-1])]
        updates = updates_of(latents, observer.outputs)
        apart = observer.spot.branch > 0
        return cls(latents, observer.outputs, updates, fitted, tuple(observer.entries), apart)


class SteeringForecaster(OutputForecaster):
    """Forecasts a batch of generations, and fits its weights on the first of them as it goes.

    It runs in the engine's place of an `OutputForecaster`, on its very terms. With w the weights
    and F the terms, a step minimises the mean over generations of
    ``|guided(target - plain - F w)|^2 / |guided(full output)|^2``, plus a ridge that shrinks to the
    plain output: the extrapolated one, at a computed step that which was computed. The target is
    the output that would take the scheduler from where it is to the full run's next latents.
    By branch, the terms without guidance and those with it are fitted side by side. The latents
    are the same in both, so that their terms have the same weights. Where the branches are calls
    that come one after the other, each is fitted in its turn, to what those before it have left.

    Args:
        full: the same batch with full computation.
        observer: of this run.
        by_branch: whether pictures without and with guidance have weights of their own; for a
            batch of both; for a call of each they always have.

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
        shape = (2, 5) if by_branch or full.apart else (5,)
        self.found = np.zeros((len(full.outputs), *shape), np.float32)
        self._guided: int | None = None

    def on_branch(self, guided: int | None) -> SteeringForecaster:
        """Note which branch the call at work is of."""
        self._guided = guided
        return self

    def _correct(
        self, plain: Streams, memory: Memory, inputs: Streams, noise_level: float, computed: bool
    ) -> Streams:
        """Fit this step's weights, and return the forecast, or what was computed, with them."""
        terms = self.terms(memory, inputs, computed)
        step, latents = self.observer.spot.step, inputs.hidden_states
        made = [noise_tokens(x, latents) for x in (plain.hidden_states, *terms)]
        (given, *_), base, *columns = self.observer.rows(latents, *made)
        place = self.observer.team.place
        if self.full.apart:
            if self._guided is None:
                raise ValueError(
                    "guidance comes in several calls a step, and which is which is not known: they "
                    "need the names cond and uncond of cache_context; leave --computed_steps out"
                )
            weights = self._agreed(lambda: self._fit(step, given, base, columns))
            self.found[step][self._guided] = weights
            return self.corrected(plain, terms, weights.tolist())
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
        seen = self.observer
        for before, (of_latents, of_outputs) in zip(
            range(step - 1, -1, -1), update.before, strict=False
        ):
            moved = seen.latents[before] - full.latents[before]
            astray += of_latents * moved[:, at]
            made = seen.outputs[before] - full.outputs[before]
            astray += torch.tensordot(of_outputs, made[:, :, at], dims=1)
        target = full.outputs[step][:, :, at] - astray / update.outputs.sum()
        size = update.guided(full.outputs[step])[: full.fitted].flatten(1).norm(dim=1)

        def relative(rows: torch.Tensor, branches: slice = slice(None)) -> NDArray[np.float64]:
            guided = update.guided(rows, branches)[: full.fitted].flatten(1) / size[:, None]
            return guided.flatten().double().cpu().numpy()

        of_call, missing = slice(None), target - plain
        if full.apart:
            call = seen.spot.branch
            of_call = slice(call, call + 1)
            missing = target[of_call] - plain
        columns = np.stack([relative(term, of_call) for term in terms], axis=1)
        wanted = relative(missing, of_call)
        if full.apart and call:
            # What the calls before have left, at this very step.
            wanted = wanted + relative(target[:call] - seen.outputs[step], slice(call))
        sums = columns.T @ columns, columns.T @ wanted
        if at.start:
            sums = self._sums[0] + sums[0], self._sums[1] + sums[1]
        self._sums = sums
        return ridge_weights(*sums, TRAJECTORY_RIDGE).astype(np.float32)

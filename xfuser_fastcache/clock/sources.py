"""Where the clock reads the time, best first: each source says at which step a forward pass is.

A timestep is a poor clock. In half precision neighbouring ones are often equal at real sizes, and
some models are given one a token. So it is read only where nothing better is there, and where a
better source has yet to prove itself; on a GPU each reading waits for the device.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from xfuser_fastcache.clock.plan import Plan, Timestep
from xfuser_fastcache.consensus.topology import Position

_MISSING = object()


@dataclass(frozen=True)
class Arrival:
    """A forward pass as it begins.

    Attributes:
        latents: what it is given; calls of one step are given the same tensor.
        read_timestep: reads its timestep from the device.
        noise_level_of: from a timestep's value to sigma, by the adapter.
        shape: batch, tokens, dtype, device: what has to be equal for anchors to serve.
        position: which tokens it carries.
        scheduler: that plans its steps, or None.
        plan: of that scheduler, or None.
        name: of its branch, by `cache_context`; None without one.
        context_step: step of the loop, by `cache_context`; None where that does not say.
        stages: of the pipeline. Schedulers of all but one stage stand still.
        denoiser: which one of the pipeline's.
        setup: batch, size and plan, in words that are equal on all ranks.
        inputs: makes a digest of what it is given beside its timestep; told whether of values, or
            of shapes alone, and whether of its latents as well.
    """

    latents: torch.Tensor
    read_timestep: Callable[[], torch.Tensor]
    noise_level_of: Callable[[float], float]
    shape: object = None
    position: Position = field(default_factory=Position)
    scheduler: Any = None
    plan: Plan | None = None
    name: str | None = None
    context_step: int | None = None
    stages: int = 1
    denoiser: int = 0
    setup: str = ""
    inputs: Callable[[bool, bool], str] = lambda values, latents: ""

    @cached_property
    def timestep(self) -> Timestep:
        """The timestep, read once."""
        return Timestep.of(self.read_timestep())

    @property
    def noise_level(self) -> float:
        """Sigma by the adapter, in the model's precision."""
        return self.noise_level_of(self.timestep.value)


@dataclass(frozen=True)
class Spot:
    """Where a source sees a forward pass.

    Attributes:
        index: place in the plan; None where there is none.
        step: "same" as the last one's, "next", or "new" where a generation begins.
    """

    index: int | None
    step: str


@dataclass
class Past:
    """What is known of the last forward pass of the generation.

    Attributes:
        index: its place in the plan; None where that is not known.
        context_step: by `cache_context`.
        value: its timestep, where that was read.
        level: its sigma.
        latents: what it was given; calls of one step are given the same tensor.
        shape: batch, tokens, dtype, device.
        called: of its step, what the calls of each denoiser went by, and their shapes.
    """

    index: int | None
    context_step: int | None
    value: float | None
    level: float
    latents: weakref.ReferenceType[torch.Tensor]
    shape: object = None
    called: dict[int, list[tuple[object, object]]] = field(default_factory=dict)

    def is_of_same_step(self, arrival: Arrival) -> bool:
        """Say whether the calls are given the same tensor, as those of one step are."""
        return self.latents() is arrival.latents

    def has_called(self, arrival: Arrival) -> bool:
        """Say whether this step has had this branch, by its name and shape."""
        branch = arrival.name, arrival.shape
        return arrival.name is not None and branch in self.called.get(arrival.denoiser, ())

    def repeats(self, arrival: Arrival) -> bool:
        """Say whether this looks like a branch that the step has had: by its name, or else since
        latents of one shape are others."""
        if arrival.name is not None:
            return self.has_called(arrival)
        called = bool(self.called.get(arrival.denoiser))
        return called and arrival.shape == self.shape and not self.is_of_same_step(arrival)


class Source(ABC):
    """One way to tell the time.

    Attributes:
        name: for statistics.
    """

    name: str

    @abstractmethod
    def place(self, arrival: Arrival, past: Past | None) -> Spot | None:
        """Return where a forward pass is, or None where this source cannot say.

        Args:
            arrival: the forward pass.
            past: the last one; None where a generation begins, whatever else is known.
        """


class SchedulerCounter(Source):
    """The scheduler's `step_index`, which moves once a step whatever dtype the model has.

    Until it has moved to an entry that fits, timesteps are read and compared: who never calls
    `scheduler.step` has a counter that stands still. One that has not begun stands where the
    pipeline enters the plan.
    """

    name = "scheduler"

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._entered: int | None = None
        self._moved = False
        self._distrusted = False

    def place(self, arrival: Arrival, past: Past | None) -> Spot | None:
        """Read the counter."""
        plan = arrival.plan
        counter: Any = getattr(arrival.scheduler, "step_index", _MISSING)
        if plan is None or counter is _MISSING or arrival.stages > 1:
            return None
        if self._plan is None or plan.timesteps is not self._plan.timesteps:
            self._plan, self._entered = plan, None
            self._moved = self._distrusted = False
        if counter is None:
            counter = getattr(arrival.scheduler, "begin_index", None)
        if counter is None:
            entry = self._entered
            counter = plan.entry_of(arrival.timestep) if entry is None else entry
        if counter is None or counter >= len(plan.steps):
            return None
        index = int(counter)
        if not self._proves(index, plan, arrival, past):
            return None
        if past is None or past.index is None or index < past.index:
            return Spot(index, "new")
        return Spot(index, "next" if index > past.index else "same")

    def _proves(self, index: int, plan: Plan, arrival: Arrival, past: Past | None) -> bool:
        """Say whether the counter can be believed by now."""
        if self._moved:
            return True
        fits = plan.has(index, arrival.timestep)
        self._entered = index if self._entered is None else self._entered
        self._moved = fits and index != self._entered
        # A call that the step has had, at a timestep that the next one may have as well.
        again = past is not None and past.repeats(arrival)
        stands = again and plan.has(index + 1, arrival.timestep)
        self._distrusted |= not fits or stands
        return self._moved or not self._distrusted


class ContextStep(Source):
    """The step that a pipeline gives with `cache_context(name, step_index=...)`.

    It counts the pipeline's loop, which may enter the plan in the middle.
    """

    name = "cache_context"

    def place(self, arrival: Arrival, past: Past | None) -> Spot | None:
        """Take the pipeline's word."""
        now = arrival.context_step
        if now is None:
            return None
        if past is None or past.context_step is None or now < past.context_step:
            entered = None if arrival.plan is None else arrival.plan.entry_of(arrival.timestep)
            return Spot(entered, "new")
        moved = now - past.context_step
        index = None if past.index is None else past.index + moved
        return Spot(index, "next" if moved else "same")


class PlanByCount(Source):
    """The plan, followed entry by entry: the next call of a branch is the next entry.

    Where two entries are rounded to one timestep, a branch that the step has had already, or other
    latents, tell that the next one has begun. A plan that is not followed is not used.
    """

    name = "plan"

    def place(self, arrival: Arrival, past: Past | None) -> Spot | None:
        """Compare the timestep with the entries that may come."""
        plan = arrival.plan
        if plan is None:
            return None
        timestep = arrival.timestep
        if past is None:
            entered = plan.entry_of(timestep)
            return None if entered is None else Spot(entered, "new")
        if past.index is None:
            return None
        same, following = plan.has(past.index, timestep), plan.has(past.index + 1, timestep)
        again = past.has_called(arrival)
        if same and following:
            # Stages of a pipeline are given one buffer again and again.
            given_again = arrival.stages == 1 and past.is_of_same_step(arrival)
            same = not again and (given_again or arrival.name is not None)
            following = not same
        if following:
            return Spot(past.index + 1, "next")
        if same:
            return Spot(past.index, "new" if again else "same")
        entered = plan.entry_of(timestep)
        return Spot(entered, "new") if entered is not None and entered < past.index else None


class Values(Source):
    """Values of timesteps, where nothing else is there.

    Falling noise counts steps, rising noise begins a generation. At one timestep, other names or
    the same latents are other branches; anything else begins a generation, since a picture of one
    step looks like that.
    """

    name = "timesteps"

    def place(self, arrival: Arrival, past: Past | None) -> Spot:
        """Compare with the last timestep."""
        if past is None:
            return Spot(None, "new")
        if arrival.noise_level > past.level:
            return Spot(None, "new")
        if arrival.timestep.value != past.value:
            return Spot(None, "next")
        if arrival.name is not None:
            return Spot(None, "new" if past.has_called(arrival) else "same")
        return Spot(None, "same" if past.is_of_same_step(arrival) else "new")

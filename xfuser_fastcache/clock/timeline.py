"""When is it: generations, steps, branches and patches of a pipeline's forward passes."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, replace

from xfuser_fastcache.clock.plan import Plan
from xfuser_fastcache.clock.sources import (
    Arrival,
    ContextStep,
    Past,
    PlanByCount,
    SchedulerCounter,
    Source,
    Spot,
    Values,
)
from xfuser_fastcache.consensus.topology import Position

logger = logging.getLogger("xfuser_fastcache")
# By the names that diffusers' pipelines and guiders give calls: 1 with the prompt, 0 without.
_GUIDED = {"cond": 1, "uncond": 0, "pred_cond": 1, "pred_uncond": 0}


@dataclass(frozen=True)
class Call:
    """One forward pass of the transformer, placed in time.

    Attributes:
        generation: counts from 0.
        step: denoising step, from 0.
        planned_step: the step's place in the scheduler's plan, which a pipeline may enter in the
            middle; `step` where that is not known.
        branch: CFG trajectory, from 0 in the order in which they first appear in the generation.
        opens_step: False for the second and later patches of a step.
        noise_level: sigma.
        is_last_step: whether the schedule ends here; False where the number of steps is unknown.
        more_steps_follow: whether the schedule goes on; False where that is unknown.
        position: which tokens this rank carries.
        starts_generation: whether everything older is to be forgotten.
        entered: the step at which this denoiser has entered the generation.
        name: of its branch, by `cache_context`; None without one.
        setup: what it is given, in words that are equal on all ranks.
        steps: that the generation takes, from the one it began at; None if unknown.
    """

    generation: int
    step: int
    planned_step: int
    branch: int
    opens_step: bool
    noise_level: float
    is_last_step: bool
    more_steps_follow: bool
    position: Position
    starts_generation: bool
    entered: int = 0
    name: str | None = None
    setup: str = ""
    steps: int | None = None

    @property
    def guided(self) -> int | None:
        """Which branch of guidance it is: 0 without the prompt, 1 with it; None where its name does
        not say, as where both come in one batch."""
        return None if self.name is None else _GUIDED.get(self.name)

    @property
    def elapsed(self) -> float | None:
        """How far the plan has gone, from 0 at its first step to 1 at its last; None if unknown."""
        if self.steps is None:
            return None
        last = self.planned_step - self.step + self.steps - 1
        return self.planned_step / last if last > 0 else 1.0

    @property
    def place(self) -> str:
        """The call in words, for messages."""
        patch = f", patch {self.position.patch}" if self.position.patched else ""
        return f"generation {self.generation}, step {self.step}, branch {self.branch}{patch}"


class Timeline:
    """Places forward passes, by the best source that there is.

    A new generation starts where the scheduler has a new plan, or where the source says so. A
    branch is what calls of a step have in common from step to step: their name by `cache_context`,
    or else their order within the step; and their shape, since anchors of another batch or size
    cannot serve. So a branch may be left out at some steps; without names only the last ones.

    Args:
        num_steps: steps of a generation where no scheduler tells; None if unknown.

    Attributes:
        source: what the last forward pass was placed by; None before.
    """

    def __init__(self, num_steps: int | None = None):
        self.num_steps = num_steps
        self.source: Source | None = None
        self._sources = (SchedulerCounter(), ContextStep(), PlanByCount(), Values())
        self._generation = -1
        self._plan: Plan | None = None
        self._past: Past | None = None
        self._call: Call | None = None
        # Of this generation: denoiser -> what a branch goes by -> its index.
        self._branches: dict[int, dict[object, int]] = {}
        # Of this generation: denoiser -> the step at which it was first called.
        self._entered: dict[int, int] = {}
        self._warned = False

    def open(self, arrival: Arrival) -> Call:
        """Place a forward pass."""
        later_patch = arrival.position.patched and arrival.position.patch > 0
        if later_patch and self._past is not None and self._call is not None:
            self._call = replace(
                self._call, opens_step=False, position=arrival.position, starts_generation=False
            )
            return self._call
        fresh = self._past is None or self.replanned(arrival.plan)
        spot = self._placed(arrival, None if fresh else self._past)
        self._plan = arrival.plan
        past = self._past
        again = past is not None and spot.step == "same" and past.has_called(arrival)
        starts = fresh or spot.step == "new" or again
        if starts:
            self._generation += 1
            self._branches, self._entered = {}, {}
            step, called = 0, {}
        else:
            assert self._call is not None and past is not None
            step = self._call.step + (spot.step == "next")
            called = past.called if spot.step == "same" else {}
        entered = self._entered.setdefault(arrival.denoiser, step)
        branch = self._branch_of(arrival, called)
        level, remaining, steps = self._planned(arrival, spot.index, step)
        read = "timestep" in vars(arrival)
        self._past = Past(
            index=spot.index,
            context_step=arrival.context_step,
            value=arrival.timestep.value if read else None,
            level=arrival.noise_level if read else level,
            latents=weakref.ref(arrival.latents),
            shape=arrival.shape,
            called=called,
        )
        self._call = Call(
            generation=self._generation,
            step=step,
            planned_step=step if spot.index is None else spot.index,
            branch=branch,
            opens_step=True,
            noise_level=level,
            is_last_step=remaining == 0,
            more_steps_follow=bool(remaining),
            position=arrival.position,
            starts_generation=starts,
            entered=entered,
            name=arrival.name,
            setup=arrival.setup,
            steps=steps,
        )
        return self._call

    def _placed(self, arrival: Arrival, past: Past | None) -> Spot:
        """Return what the best source says."""
        for source in self._sources:
            spot = source.place(arrival, past)
            if spot is not None:
                break
        assert spot is not None
        if source is self._sources[-1] and not self._warned:
            self._warned = True
            logger.warning(
                "Steps are told apart by the values of timesteps, since no scheduler has planned "
                "them: the last step is not known unless num_steps is given, rounded timesteps may "
                "be taken for each other, and on a GPU each call waits for the device. Pass "
                "scheduler=..., or use the transformer within its pipeline. (Said once.)"
            )
        self.source = source
        return spot

    def _branch_of(self, arrival: Arrival, called: dict[int, list[tuple[object, object]]]) -> int:
        """Return the branch of a forward pass, and note it among the calls of its step."""
        of_step = called.setdefault(arrival.denoiser, [])
        goes_by = len(of_step) if arrival.name is None else arrival.name
        of_step.append((goes_by, arrival.shape))
        known = self._branches.setdefault(arrival.denoiser, {})
        return known.setdefault((goes_by, arrival.shape), len(known))

    def following(self, call: Call) -> Call | None:
        """Return the next step of the last call's branch as it is planned; None if unknown."""
        steps = self._plan.steps if self._plan is not None else ()
        known = self._past is not None and self._past.index is not None
        if not known or call.planned_step + 1 >= len(steps):
            return None
        index = call.planned_step + 1
        return replace(
            call,
            step=call.step + 1,
            planned_step=index,
            noise_level=steps[index].noise_level,
            is_last_step=index + 1 == len(steps),
            more_steps_follow=index + 1 < len(steps),
            starts_generation=False,
        )

    def replanned(self, plan: Plan | None) -> bool:
        """Say whether the scheduler has made a new plan since the last forward pass."""
        return (
            plan is not None
            and self._plan is not None
            and plan.timesteps is not self._plan.timesteps
        )

    @property
    def planned_levels(self) -> list[float]:
        """Noise levels of the plan that the last forward pass belongs to; empty if unknown."""
        if self._past is None or self._past.index is None or self._plan is None:
            return []
        return [step.noise_level for step in self._plan.steps]

    @property
    def planned_steps(self) -> int | None:
        """Number of steps in the plan that the last forward pass belongs to; None if unknown."""
        return len(self.planned_levels) or self.num_steps

    @property
    def reached(self) -> float | None:
        """Noise level of the last forward pass; None where the next one starts a generation."""
        return None if self._past is None else self._past.level

    def restart(self) -> None:
        """Let the next forward pass start a new generation."""
        self._past = None

    def _planned(
        self, arrival: Arrival, index: int | None, step: int
    ) -> tuple[float, int | None, int | None]:
        """Return the noise level in the scheduler's precision, the number of steps to come, and
        that of all that the generation takes.
        """
        if index is not None and arrival.plan is not None and index < len(arrival.plan.steps):
            steps = arrival.plan.steps
            remaining = len(steps) - 1 - index
            return steps[index].noise_level, remaining, step + 1 + remaining
        if self.num_steps is None:
            return arrival.noise_level, None, None
        return arrival.noise_level, max(0, self.num_steps - 1 - step), self.num_steps

"""When is it: generations, steps, branches and patches, by what a transformer is given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.models.adapter import Step


@dataclass(frozen=True)
class Schedule:
    """The steps that a scheduler has planned for the current generation.

    Attributes:
        timesteps: the scheduler's own tensor; `set_timesteps` makes a new one, so its identity
            marks a generation.
        steps: what it has planned, in order.
    """

    timesteps: torch.Tensor
    steps: tuple[Step, ...]


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

    @property
    def place(self) -> str:
        """The call in words, for messages."""
        patch = f", patch {self.position.patch}" if self.position.patched else ""
        return f"generation {self.generation}, step {self.step}, branch {self.branch}{patch}"


class Timeline:
    """Tells generations, steps, branches and patches apart by what the transformer is given.

    A new generation starts where the scheduler has new timesteps, where the noise level rises,
    or where shape, dtype or device change. The same timestep again is another branch, unless
    diffusers' `cache_context` names a branch that this step has had already.

    A branch goes by its name, so it may be left out at some steps. Calls without a name go by
    their order within the step: only the last ones may then be left out.

    Args:
        num_steps: steps of a generation where no scheduler tells; None if unknown.
    """

    def __init__(self, num_steps: int | None = None):
        self.num_steps = num_steps
        self._generation = -1
        self._step = 0
        self._branch = 0
        self._timestep: float | None = None
        self._noise_level = 0.0
        self._signature: object = None
        self._schedule: Schedule | None = None
        # Where in the schedule the last forward pass was; None where that is not known.
        self._index: int | None = None
        # Of this generation: what a branch goes by, its name or its place in a step -> its index.
        self._branches: dict[str | int, int] = {}
        # Of this step: what its calls so far went by.
        self._called: list[str | int] = []

    def open(
        self,
        timestep: float,
        noise_level: float,
        signature: object,
        position: Position,
        schedule: Schedule | None = None,
        branch_name: str | None = None,
    ) -> Call:
        """Place a forward pass.

        Args:
            timestep: as the transformer gets it.
            noise_level: sigma by the adapter, used where `schedule` does not give it.
            signature: batch, tokens, dtype, device: whatever must stay equal in a generation.
            position: which tokens this forward carries.
            schedule: the scheduler's plan, or None.
            branch_name: name given by `cache_context`, or None.
        """
        named_again = branch_name is not None and branch_name in self._called
        # Later patches of a step repeat its timestep and are no branch of their own.
        continues = position.patched and position.patch > 0
        same = timestep == self._timestep
        starts = (
            self._timestep is None
            or self.replanned(schedule)
            or signature != self._signature
            or noise_level > self._noise_level
            or (same and named_again and not continues)
        )
        self._schedule, self._signature = schedule, signature
        opens = True
        if starts:
            self._generation += 1
            self._step = 0
            self._branches = {}
            self._called = []
        elif continues and same:
            opens = False
        elif not same:
            self._step += 1
            self._called = []
        if opens:
            key = len(self._called) if branch_name is None else branch_name
            self._called.append(key)
            self._branch = self._branches.setdefault(key, len(self._branches))
        self._timestep, self._noise_level = timestep, noise_level
        level, remaining = self._planned(timestep, noise_level)
        return Call(
            generation=self._generation,
            step=self._step,
            planned_step=self._step if self._index is None else self._index,
            branch=self._branch,
            opens_step=opens,
            noise_level=level,
            is_last_step=remaining == 0,
            more_steps_follow=bool(remaining),
            position=position,
            starts_generation=starts,
        )

    def following(self, call: Call) -> Call | None:
        """Return the next step of the last call's branch as it is planned; None if unknown."""
        steps = self._schedule.steps if self._schedule is not None else ()
        if self._index is None or self._index + 1 >= len(steps):
            return None
        index = self._index + 1
        return replace(
            call,
            step=call.step + 1,
            planned_step=index,
            noise_level=steps[index].noise_level,
            is_last_step=index + 1 == len(steps),
            more_steps_follow=index + 1 < len(steps),
            starts_generation=False,
        )

    def replanned(self, schedule: Schedule | None) -> bool:
        """Say whether the scheduler has made a new plan since the last forward pass."""
        return (
            schedule is not None
            and self._schedule is not None
            and schedule.timesteps is not self._schedule.timesteps
        )

    @property
    def planned_levels(self) -> list[float]:
        """Noise levels of the plan that the last forward pass belongs to; empty if unknown."""
        if self._index is None or self._schedule is None:
            return []
        return [step.noise_level for step in self._schedule.steps]

    @property
    def planned_steps(self) -> int | None:
        """Number of steps in the plan that the last forward pass belongs to; None if unknown."""
        return len(self.planned_levels) or self.num_steps

    @property
    def reached(self) -> float | None:
        """Noise level of the last forward pass; None where the next one starts a generation."""
        return None if self._timestep is None else self._noise_level

    def restart(self) -> None:
        """Let the next forward pass start a new generation."""
        self._timestep = None

    def _planned(self, timestep: float, noise_level: float) -> tuple[float, int | None]:
        """Return the noise level in the scheduler's precision, and the number of steps to come.

        The transformer sees timesteps in the model's dtype (8 bits in bf16). A timestep that is
        not of the plan means that the plan is another pipeline's: then it is not used.
        """
        steps = self._schedule.steps if self._schedule is not None else ()
        self._index = None
        if steps:
            index = self._step  # where it is, unless the pipeline begins in the middle of the plan
            if index >= len(steps) or steps[index].timestep != timestep:
                index = min(range(len(steps)), key=lambda i: abs(steps[i].timestep - timestep))
            if abs(steps[index].timestep - timestep) <= 0.01 * abs(timestep) + 1e-6:
                self._index = index
                return steps[index].noise_level, len(steps) - 1 - index
        if self.num_steps is None:
            return noise_level, None
        return noise_level, max(0, self.num_steps - 1 - self._step)

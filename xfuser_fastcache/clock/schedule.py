"""Which steps are computed by plan: those of a mask, or a budget spread over a generation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.config.budget import Budget, given_budget

STEPS_MASK, BUDGET = "steps mask", "budget"
_GAP_TO_TAIL = 3


@dataclass(frozen=True)
class Schedule:
    """The steps that are computed, whatever is measured.

    Attributes:
        mask: a flag a step of the scheduler's plan; None for a budget.
        budget: spread over the steps of a generation; None for a mask.
        warm_up: first steps that a budget computes.
        limit: of consecutive skips, which a budget has to keep; None for no limit.
    """

    mask: tuple[int, ...] | None = None
    budget: Budget | None = None
    warm_up: int = 1
    limit: int | None = None

    @property
    def reason(self) -> str:
        """What it is, as the reason of a decision."""
        return STEPS_MASK if self.budget is None else BUDGET

    @property
    def beyond(self) -> str:
        """The reason of a step that it does not reach."""
        return f"beyond the {self.reason}"

    @classmethod
    def of(cls, config: CacheConfig) -> Schedule | None:
        """Return the schedule that a resolved config asks for; None where the gate decides."""
        if config.steps_mask is not None:
            return cls(mask=tuple(config.steps_mask))
        budget = given_budget(config)
        if budget is None:
            return None
        return cls(None, budget, config.num_warmup_steps, config.max_consecutive_skips)

    def computes(self, call: Call, before: int = 0) -> bool | None:
        """Say whether a step is computed; None where the schedule does not reach.

        A mask goes by the place in the scheduler's plan, which a pipeline may enter in the middle,
        a budget by the steps that are taken. Where their number is not known, a share of them is
        computed without an end.

        Args:
            call: at the step, or at a later one.
            before: so many steps later.
        """
        place = (call.step if self.mask is None else call.planned_step) - before
        flags = self.flags(call.steps)
        if flags is None and self.budget is not None and self.budget.share is not None:
            return recurs(place - max(self.warm_up, 1) + 1, self.budget.share)
        return bool(flags[place]) if flags is not None and place < len(flags) else None

    def exceeded(self, call: Call, computed: bool) -> bool:
        """Say whether it is a budget, which skips a step that was computed."""
        return computed and self.budget is not None and not self.computes(call)

    def flags(self, steps: int | None) -> tuple[int, ...] | None:
        """Return a flag a step, 1 where it is computed; None for a budget of unknown steps.

        Args:
            steps: that a generation takes; a mask has its own.
        """
        if self.budget is None or steps is None:
            return self.mask
        return spread(steps, self.budget.of(steps), self.warm_up)

    def refuses(self, planned: int | None, steps: int | None) -> str | None:
        """Say why a generation cannot begin; None where it can.

        Args:
            planned: steps of the scheduler's plan; None if unknown.
            steps: of them that the generation takes; None if unknown.
        """
        if self.mask is not None:
            if planned is None or planned == len(self.mask):
                return None
            return (
                f"steps_mask has {len(self.mask)} entries, but this generation has {planned} "
                "steps; give one entry a step of the scheduler's plan (num_inference_steps)"
            )
        assert self.budget is not None
        if steps is None:
            return self._refuses_unknown(self.budget.share)
        computed = self.budget.of(steps)
        if computed < min(self.warm_up, steps):
            return (
                f"{self.budget} computes {computed} of {steps} steps, fewer than "
                f"num_warmup_steps={self.warm_up}; give a larger budget, or leave "
                "num_warmup_steps out"
            )
        longest = max(map(len, "".join(map(str, self.flags(steps) or ())).split("1")))
        return self._refuses_gap(f"computes {computed} of {steps} steps and", longest)

    def _refuses_unknown(self, share: float | None) -> str | None:
        if share is None:
            return (
                f"{self.budget} is spread over the steps of a generation, whose number is not "
                "known; pass scheduler=..., use the transformer within its pipeline, or give "
                "num_steps"
            )
        return self._refuses_gap("without a known end", math.ceil(1 / share) - 1)

    def _refuses_gap(self, how: str, longest: int) -> str | None:
        if self.limit is not None and longest > self.limit:
            return (
                f"{self.budget} {how} skips up to {longest} in a row, more than "
                f"max_consecutive_skips={self.limit}; give a larger budget, or leave "
                "max_consecutive_skips out"
            )
        return None


@cache
def spread(steps: int, computed: int, warm_up: int = 1) -> tuple[int, ...]:
    """Return the flags of a budget, 1 where a step is computed.

    They begin with its warm-up. From there on steps are evenly spaced, and behind the last one a
    third of a gap is skipped (docs/decisions/budgets.md).

    Args:
        steps: of the generation.
        computed: how many of them are.
        warm_up: how many of those are the first ones.

    Example:
        >>> spread(12, 4)
        (1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0)
    """
    first = min(max(warm_up - 1, 0), computed - 1)
    steps, computed = steps - first, computed - first
    tail = (steps - 1) // (_GAP_TO_TAIL * (computed - 1)) if computed > 1 else 0
    return (*[1] * first, *even_mask(steps - tail, computed), *[0] * tail)


def recurs(step: int, share: float) -> bool:
    """Say whether a step is computed of steps without a known end, the first of which is 0.

    Example:
        >>> [int(recurs(step, 0.4)) for step in range(-1, 9)]
        [1, 1, 0, 0, 1, 0, 1, 0, 0, 1]
    """
    return step <= 0 or math.floor(step * share) > math.floor((step - 1) * share)


def even_mask(steps: int, computed: int, last: bool = True) -> list[int]:
    """Return a mask of evenly spaced computed steps, the first among them.

    Args:
        steps: of the plan.
        computed: how many of them are computed.
        last: whether the last step is computed, too; else a gap as long as the others ends the run.

    Example:
        >>> even_mask(7, 3), even_mask(6, 3, last=False), even_mask(3, 1)
        ([1, 0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0], [1, 0, 0])
    """
    if last and computed > 1:
        chosen = [round(i * (steps - 1) / (computed - 1)) for i in range(computed)]
    else:
        chosen = [i * steps // computed for i in range(computed)]
    return [int(step in chosen) for step in range(steps)]

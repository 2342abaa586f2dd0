"""Whether a calibration covers a generation, and what is gone by where it does not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from xfuser_fastcache.blueprint import Blueprint
from xfuser_fastcache.clock.schedule import Schedule
from xfuser_fastcache.clock.timeline import Call, Timeline
from xfuser_fastcache.decisions.policy import Rules
from xfuser_fastcache.forecasters.base import Forecaster

logger = logging.getLogger("xfuser_fastcache")

_UNCOVERED = (
    "The calibration is not for this generation: %s. It goes on: %s. For all of its gain give the "
    "scheduler, the number of steps and the size of picture that it was made with, or make another "
    "with fastcache calibrate. (Said once.)"
)


class Coverage:
    """Goes by the calibration where it covers a generation, and without it where it does not.

    Args:
        plan: what the cache is built from.
        rules: what decisions go by where it is covered.
    """

    def __init__(self, plan: Blueprint, rules: Rules):
        self._plan = plan
        self._covered = plan.forecaster, rules
        self._levels: Sequence[float] | None = None
        self._covers = True
        self._said = False

    def changed(self, call: Call, timeline: Timeline) -> tuple[Forecaster, Rules] | None:
        """Return what stands in and what decisions go by from now on; None for as before.

        Args:
            call: the forward pass that begins a generation, or at which the denoiser enters it.
            timeline: knows its plan.
        """
        plan = self._plan
        if plan.fitted is None or plan.uncovered is None:
            return None
        differs = plan.fitted.differs_from(timeline.planned_levels)
        begun = call.planned_step - call.step  # also by another denoiser
        if not differs and begun:
            differs = (
                f"it begins at step {begun} of the plan, as image-to-image does with "
                "strength below 1, and those that it was made with began at step 0"
            )
        levels = None if not differs or begun else tuple(timeline.planned_levels)
        if (not differs, levels) == (self._covers, self._levels):
            return None
        self._covers, self._levels = not differs, levels
        if not differs:
            return self._covered
        forecaster, mask = plan.uncovered(levels)
        rules, instead = self._without(mask)
        if not self._said:
            self._said = True
            logger.warning(_UNCOVERED, differs, instead)
        return forecaster, rules

    def _without(self, mask: list[int] | None) -> tuple[Rules, str]:
        """Return what decisions go by, and words for it.

        A budget takes the mask that was moved, or is spread evenly, as without a calibration. A
        mask of the user's stays. The gate has no threshold for it, and nothing is skipped.
        """
        _, rules = self._covered
        budget = self._plan.budget
        if mask is not None:
            moved = f"the mask of {budget} and its corrections are moved to these noise levels"
            return replace(rules, schedule=Schedule(tuple(mask))), moved
        if budget is not None:
            evenly = f"{budget} is spread evenly, and forecasts are those without a calibration"
            return replace(rules, schedule=Schedule(None, budget)), evenly
        if rules.schedule is not None:
            return rules, "the mask runs with forecasts that are not corrected"
        config = replace(rules.config, enable_block_approx=False)
        return replace(rules, config=config), "the gate skips nothing"

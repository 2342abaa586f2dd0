"""Whether a calibration covers the steps that a generation plans."""

from __future__ import annotations

from xfuser_fastcache.artifacts.calibration import Fitted
from xfuser_fastcache.clock.timeline import Call, Timeline


def not_covered(call: Call, timeline: Timeline, fitted: Fitted) -> str | None:
    """Say how a generation differs from those of a calibration; None where it does not.

    Args:
        call: the forward pass that begins it.
        timeline: knows its plan.
        fitted: the calibration.
    """
    wrong = fitted.differs_from(timeline.planned_levels)
    if not wrong and call.planned_step:
        return (
            f"it begins at step {call.planned_step} of the plan, as image-to-image does with "
            "strength below 1, and those that it was made with began at step 0"
        )
    return wrong

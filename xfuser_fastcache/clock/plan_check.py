"""Whether a schedule and a calibration are for the steps that a generation plans."""

from __future__ import annotations

from xfuser_fastcache.artifacts.calibration import Fitted
from xfuser_fastcache.clock.schedule import Schedule
from xfuser_fastcache.clock.timeline import Call, Timeline


def refused_plan(
    call: Call, timeline: Timeline, schedule: Schedule | None, fitted: Fitted | None
) -> str | None:
    """Say why a generation cannot begin as it is planned; None where it can.

    One that has begun is never refused: what a schedule or a calibration does not cover is
    computed.

    Args:
        call: the forward pass that begins it, or a later one.
        timeline: knows its plan.
        schedule: of computed steps, or None.
        fitted: the calibration, or None.
    """
    if not call.starts_generation:
        return None
    if fitted is not None:
        wrong = fitted.differs_from(timeline.planned_levels)
        if not wrong and call.planned_step:
            wrong = (
                f"it begins at step {call.planned_step} of the plan, as image-to-image does "
                "with strength below 1, and those that it was made with began at step 0"
            )
        if wrong:
            return (
                f"the calibration is not for this generation: {wrong}. Give the scheduler, "
                "the number of steps and the size of picture that it was made with, make "
                "another with fastcache calibrate, or leave calibration out"
            )
    return None if schedule is None else schedule.refuses(timeline.planned_steps, call.steps)

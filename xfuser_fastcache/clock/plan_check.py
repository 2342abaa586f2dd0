"""Whether a mask of steps and a calibration are for the steps that a generation plans."""

from __future__ import annotations

from xfuser_fastcache.artifacts.calibration import Fitted
from xfuser_fastcache.clock.timeline import Call, Timeline


def refused_plan(
    call: Call, timeline: Timeline, mask: list[int] | None, fitted: Fitted | None
) -> str | None:
    """Say why a generation cannot go on as it is planned; None where it can.

    Args:
        call: the forward pass that begins it, or a later one.
        timeline: knows its plan.
        mask: of computed steps, or None.
        fitted: the calibration, or None.
    """
    if fitted is not None and call.starts_generation:
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
    if mask is None:
        return None
    planned = timeline.planned_steps or len(mask)
    if planned == len(mask) and call.planned_step < planned:
        return None
    steps = f"has {planned}" if planned != len(mask) else f"goes on after {planned}"
    return (
        f"steps_mask has {len(mask)} entries, but this generation {steps} steps; give one "
        "entry a step of the scheduler's plan (num_inference_steps)"
    )

"""What a pipeline of stages could gain by given skips, if messages took no time."""

from __future__ import annotations

# Steps that xDiT's pipeline runs all tokens through the stages one after another, its default.
SYNCHRONOUS_STEPS = 1


def pipeline_slots(
    skipped: list[bool], stages: int, patches: int, stagger: bool, masked: bool = False
) -> int:
    """Return how long a pipeline takes, in units of one stage's work on one patch.

    A stage takes the patches in order; the first one needs what the last made of the same patch at
    the step before. Skipped work and messages take no time. Steps that are not patched go through
    the stages one after another.

    Args:
        skipped: a flag a step, for the stack as one span.
        stages: of the pipeline.
        patches: that a step is cut into.
        stagger: whether stages act as with `stagger_stages`.
        masked: whether a mask decides; else the first two steps and the last are computed by all.
    """
    steps = len(skipped)
    together = () if masked else (1, steps - 1)
    now = SYNCHRONOUS_STEPS * stages * patches
    free = [now] * stages
    latents = [now] * patches
    for step in range(SYNCHRONOUS_STEPS, steps):
        for patch in range(patches):
            arrived = latents[patch]
            for stage in range(stages):
                ahead = stagger and stage + patch >= patches and step not in together
                computed = not skipped[min(step + ahead, steps - 1)]
                if ahead and step == steps - 1:  # computed a step before, if on its own
                    computed = computed and not skipped[step - 1]
                arrived = max(arrived, free[stage]) + computed
                free[stage] = arrived
            latents[patch] = arrived
    return max(free)


def pipeline_allows(
    skipped: list[bool], stages: int, patches: int, stagger: bool, masked: bool = False
) -> float:
    """Return the speedup of these decisions where skipped work and messages cost nothing.

    Example:
        >>> round(pipeline_allows([False, True] * 8, stages=2, patches=2, stagger=False), 2)
        1.4
        >>> round(pipeline_allows([False, True] * 8, stages=2, patches=2, stagger=True), 2)
        1.94
    """
    uncached = pipeline_slots([False] * len(skipped), stages, patches, stagger=False)
    return uncached / pipeline_slots(skipped, stages, patches, stagger, masked)

"""What gates have measured: which tensor, where in the stack, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Probe(Enum):
    """What a gate rests on.

    Members:
        SPAN_INPUT: what enters a span, against what entered it when it was last computed, in
            squared L2 norms.
        MODULATED_INPUT: what enters the first block, normed and modulated by the timestep's
            embedding, against the step before, whether that was computed or not; in L1 norms.
        FIRST_RESIDUAL: what the first block adds, against the last step at which all was computed,
            in L1 norms. The first block is then a span of its own and always computed, and the
            decision falls behind it.
        MIDDLE_RESIDUAL: what the block in the middle of the stack adds where it is computed,
            against the time before, in L1 norms. It is known at the next decision.
    """

    SPAN_INPUT = "the input of a span"
    MODULATED_INPUT = "the modulated input of the first block"
    FIRST_RESIDUAL = "the residual of the first block"
    MIDDLE_RESIDUAL = "the residual of the middle block"

    @property
    def norm(self) -> int:
        """2 for squared L2 norms, 1 for L1 norms."""
        return 2 if self is Probe.SPAN_INPUT else 1


@dataclass(frozen=True)
class MomentGroup:
    """One group of moments in the vector.

    Attributes:
        probe: what it measures.
        block: index of the block of the whole model at which it is measured.
        span: the span whose anchors it is measured against; None where its reference follows the
            steps of the whole stack.
    """

    probe: Probe
    block: int
    span: int | None


def groups_of(probes: tuple[Probe, ...], spans: list[int]) -> list[MomentGroup]:
    """Return the groups of moments that `probes` ask for.

    Args:
        probes: each once.
        spans: span of each block of the whole model.

    Example:
        >>> (group,) = groups_of((Probe.MIDDLE_RESIDUAL,), [0, 0, 1, 1])
        >>> group.block, group.span
        (2, 1)
    """
    groups = []
    for probe in probes:
        if probe is Probe.SPAN_INPUT:
            groups += [MomentGroup(probe, spans.index(span), span) for span in sorted(set(spans))]
        elif probe is Probe.MIDDLE_RESIDUAL:
            middle = len(spans) // 2
            groups.append(MomentGroup(probe, middle, spans[middle]))
        else:
            groups.append(MomentGroup(probe, 0, None))
    return groups

"""What all ranks know alike: a function of reduced vectors alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from xfuser_fastcache.consensus.transfer import Ticket
from xfuser_fastcache.measurements.moments import INITIAL_EXPONENT, SLOTS, Moments
from xfuser_fastcache.measurements.probes import MomentGroup, Probe


@dataclass(frozen=True)
class Sighting:
    """Where and at which scale a group of moments was measured; the same on all ranks.

    Attributes:
        exponent: the scale is `2**exponent`.
        noise_level: sigma of the measured step.
        anchor_level: sigma of the step measured against; None where there was none.
        gap: steps between the two.
    """

    exponent: int
    noise_level: float
    anchor_level: float | None
    gap: int = 1


@dataclass
class GroupState:
    """What all ranks know of one group of moments: a function of reduced vectors alone.

    Attributes:
        exponent: scale for the next measurement.
        moments: last reduced moments with their sighting; None where nothing was measured.
    """

    exponent: int = INITIAL_EXPONENT
    moments: tuple[Moments, Sighting] | None = None


class Mark(NamedTuple):
    """A step of a branch: its noise level, and its index in the generation."""

    noise_level: float
    step: int


class Audit(NamedTuple):
    """A skip whose true error is measured: the span is computed as well.

    Attributes:
        span: that is skipped.
        exponent: the error is measured at the scale `2**exponent`.
    """

    span: int
    exponent: int


class Posted(NamedTuple):
    """A posted vector, with what was measured into it and where; the same on all ranks.

    Attributes:
        ticket: of the vector.
        sightings: of its groups of moments; None where nothing was measured.
        audit: whose error it carries, or None.
    """

    ticket: Ticket
    sightings: list[Sighting | None]
    audit: Audit | None


@dataclass
class SpanState:
    """What all ranks know of one span in one branch: a function of reduced vectors alone.

    Attributes:
        anchor: where the span was last computed; None before.
        older_level: sigma at which it was computed before that; None before.
        gate_state: what the gate remembers of it.
    """

    anchor: Mark | None = None
    older_level: float | None = None
    gate_state: Any = None


@dataclass(frozen=True)
class StepPlan:
    """What a forward pass is to do.

    Attributes:
        skip: a flag a span, True where it is skipped.
        distrust: whether anchors may hold a NaN and are to be forgotten.
        all_tokens: whether computed spans run on all tokens, whatever the token plan.
        moving: tokens that move in the shard and batch item in which most do.
    """

    skip: list[bool]
    distrust: bool = False
    all_tokens: bool = True
    moving: int = 0


@dataclass
class SharedState:
    """What all ranks know of one CFG branch of the current generation.

    Attributes:
        spans: one a span of the whole model.
        groups: one a group of moments.
        previous: the last step; None before.
        computed: the last step at which no span was skipped; None before.
        step_plan: those of the current step.
        forced: whether no stage may act on those of the next step instead.
        sightings: of the moments measured since the last post, one a group; None where nothing was.
        audit: of the current step; None where nothing is audited.
        posted: vectors not yet used, oldest first.
        poisoned: why the last reduced vector cannot be weighed: it was not finite, or its sums
            overflowed; None where it can.
        token_counts: those of the last reduced vector, of one rank after the other.
        waited_s: seconds that this rank waited for it; the one thing here that ranks do not share.
    """

    spans: list[SpanState]
    groups: list[GroupState]
    previous: Mark | None = None
    computed: Mark | None = None
    step_plan: StepPlan = field(default_factory=lambda: StepPlan([]))
    forced: bool = False
    sightings: list[Sighting | None] = field(default_factory=list)
    audit: Audit | None = None
    posted: list[Posted] = field(default_factory=list)
    poisoned: str | None = None
    token_counts: list[int] = field(default_factory=list)
    waited_s: float = 0.0

    def __post_init__(self) -> None:
        self.sightings = [None] * len(self.groups)


def count_groups(ranks: int, edges: int) -> int:
    """Return how many groups of moments have room for every rank's token counts at every edge."""
    return -(-ranks * edges // SLOTS)


def reference_of(shared: SharedState, group: MomentGroup) -> Mark | None:
    """Return the step that a group is measured against, as `Prober.renew` keeps it."""
    if group.span is not None:
        return shared.spans[group.span].anchor
    return shared.computed if group.probe is Probe.FIRST_RESIDUAL else shared.previous


def rescaled(
    moments: Moments, sighting: Sighting, noise_level: float, anchor: float, norm: int = 2
) -> Moments:
    """Bring moments to another step: change grows with the gap in noise level to the anchor.

    `Q(now) = Q(then) * ((sigma - anchor) / (sigma_then - anchor_then))**norm`.

    Args:
        moments: measured at `sighting`, against an anchor.
        sighting: where they were measured; its `anchor_level` is not None.
        noise_level: sigma of the step that is decided.
        anchor: sigma of the anchor that a skip would use.
        norm: in which they were measured: 2 for squared L2 norms, 1 for L1 norms.
    """
    then = abs(sighting.noise_level - (sighting.anchor_level or 0.0))
    now = abs(noise_level - anchor)
    if then == now or then == 0.0:
        return moments
    ratio = (now / then) ** norm
    return replace(
        moments,
        change=moments.change * ratio,
        change_squared=moments.change_squared * ratio * ratio,
    )

"""What is remembered, for which branch and patch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from xfuser_fastcache.block_contract import Streams, cut
from xfuser_fastcache.consensus import Ticket
from xfuser_fastcache.layout import Position
from xfuser_fastcache.moments import INITIAL_EXPONENT, SLOTS, Moments, Reference

# Stands for the patch's index where a forward pass carries all tokens.
WHOLE = -1


@dataclass(frozen=True)
class Anchor:
    """A span at a step at which it was really computed.

    Where a token plan left tokens out of that step, these are as they were last computed.

    Attributes:
        noise_level: sigma of that step.
        inputs: what entered the span, `(batch, tokens, dim)` a stream.
        residual: what left the span minus what entered it, same shapes; of a whole forward pass,
            what it put out.
        reference: the image tokens of `inputs` with their energies, for the next measurement; None
            where neither a gate nor a token plan rests on them.
        levels: sigma at which each image token was computed, float32 `(batch, tokens, 1)`; None
            where it is `noise_level` for all.
    """

    noise_level: float
    inputs: Streams
    residual: Streams
    reference: Reference | None
    levels: torch.Tensor | None = None

    def split(self, lengths: tuple[int, ...]) -> list[Anchor]:
        """Cut the anchor along the image tokens into patches of the given lengths."""
        parts = list(zip(self.inputs.split(lengths), self.residual.split(lengths), strict=True))
        references: list[Reference | None] = [None] * len(parts)
        if self.reference is not None:
            energies = cut(self.reference.energy, lengths)
            references = [
                Reference(inputs.hidden_states, energy)
                for (inputs, _), energy in zip(parts, energies, strict=True)
            ]
        return [
            Anchor(self.noise_level, inputs, residual, reference)
            for (inputs, residual), reference in zip(parts, references, strict=True)
        ]

    def nbytes(self) -> int:
        """Bytes held."""
        held = self.inputs.nbytes() + self.residual.nbytes()
        if self.reference is not None:
            held += self.reference.energy.nbytes
        return held


@dataclass(frozen=True)
class Memory:
    """What is remembered of one span, for one branch and patch.

    Attributes:
        anchors: newest first, as many as the forecaster looks back.
        slope: per-channel correction of the linear forecaster, `(dim,)` a stream; else None.
        missed: what the forecast of the newest anchor's step would have been wrong by; None where
            nobody asks for it.
        given_up: whether the span's output was not seen at the step at which it was last computed;
            there are no anchors then.
    """

    anchors: tuple[Anchor, ...] = ()
    slope: Streams | None = None
    missed: Streams | None = None
    given_up: bool = False

    def split(self, lengths: tuple[int, ...]) -> list[Memory]:
        """Cut the memory of all tokens into the memories of consecutive patches."""
        cut = [anchor.split(lengths) for anchor in self.anchors]
        missed = [None] * len(lengths) if self.missed is None else self.missed.split(lengths)
        return [
            replace(self, anchors=tuple(parts[patch] for parts in cut), missed=missed[patch])
            for patch in range(len(lengths))
        ]

    def nbytes(self) -> int:
        """Bytes held."""
        held = sum(anchor.nbytes() for anchor in self.anchors)
        return held + sum(x.nbytes() for x in (self.slope, self.missed) if x is not None)


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
class Orders:
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
        orders: those of the current step.
        forced: whether no stage may act on those of the next step instead.
        sightings: of the moments measured since the last post, one a group; None where nothing was.
        audit: of the current step; None where nothing is audited.
        posted: vectors not yet used, oldest first.
        poisoned: whether the last reduced vector was not finite or overflowed.
        token_counts: those of the last reduced vector, of one rank after the other.
        waited_s: seconds that this rank waited for it; the one thing here that ranks do not share.
    """

    spans: list[SpanState]
    groups: list[GroupState]
    previous: Mark | None = None
    computed: Mark | None = None
    orders: Orders = field(default_factory=lambda: Orders([]))
    forced: bool = False
    sightings: list[Sighting | None] = field(default_factory=list)
    audit: Audit | None = None
    posted: list[Posted] = field(default_factory=list)
    poisoned: bool = False
    token_counts: list[int] = field(default_factory=list)
    waited_s: float = 0.0

    def __post_init__(self) -> None:
        self.sightings = [None] * len(self.groups)


def count_groups(ranks: int, edges: int) -> int:
    """Return how many groups of moments have room for every rank's token counts at every edge."""
    return -(-ranks * edges // SLOTS)


@dataclass
class LocalState:
    """What this rank alone holds of one CFG branch of the current generation.

    Attributes:
        pending: moments measured since the last post, int64 `(groups, SLOTS)`, and below them the
            slots of token counts, a row of edges a rank (see `count_groups`), or the moments of an
            audit.
        memories: span -> patch (`WHOLE` for all tokens) -> what the forecaster remembers.
        references: group -> patch -> what it is measured against, where no anchor holds that.
        seen: group -> what was measured of it in this forward pass.
    """

    pending: torch.Tensor
    memories: dict[int, dict[int, Memory]] = field(default_factory=dict)
    references: dict[int, dict[int, Reference]] = field(default_factory=dict)
    seen: dict[int, torch.Tensor] = field(default_factory=dict)

    def memory(self, span: int, position: Position) -> Memory:
        """Return what is remembered of a span for the tokens of `position`.

        What was remembered of all tokens in PipeFusion's synchronous steps is cut into patches at
        the first patched step.
        """
        patches = self.memories.setdefault(span, {})
        if position.patched and WHOLE in patches:
            whole = patches.pop(WHOLE)
            patches.update(enumerate(whole.split(position.patch_tokens)))
        return patches.get(_patch(position), Memory())

    def remember(self, span: int, position: Position, memory: Memory) -> None:
        """Replace what is remembered of a span for the tokens of `position`."""
        self.memories[span][_patch(position)] = memory

    def reference(self, group: int, position: Position) -> Reference | None:
        """Return what a group is measured against for the tokens of `position`, cut as memories."""
        patches = self.references.setdefault(group, {})
        if position.patched and WHOLE in patches:
            whole, lengths = patches.pop(WHOLE), position.patch_tokens
            parts = zip(cut(whole.hidden_states, lengths), cut(whole.energy, lengths), strict=True)
            patches.update((i, Reference(*part, whole.norm)) for i, part in enumerate(parts))
        return patches.get(_patch(position))

    def refer(self, group: int, position: Position, reference: Reference) -> None:
        """Replace what a group is measured against for the tokens of `position`."""
        self.references[group][_patch(position)] = reference

    def nbytes(self) -> int:
        """Bytes of all memories and references of this branch."""
        held = sum(m.nbytes() for patches in self.memories.values() for m in patches.values())
        references = (r for patches in self.references.values() for r in patches.values())
        return held + sum(r.hidden_states.nbytes + r.energy.nbytes for r in references)


def _patch(position: Position) -> int:
    return position.patch if position.patched else WHOLE


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

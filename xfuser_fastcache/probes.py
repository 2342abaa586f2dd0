"""What gates have measured: which tensor, where in the stack, and against what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from xfuser_fastcache.block_contract import Streams
from xfuser_fastcache.layout import Position
from xfuser_fastcache.moments import Reference, measure
from xfuser_fastcache.state import LocalState, SharedState


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
class Group:
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


def groups_of(probes: tuple[Probe, ...], spans: list[int]) -> list[Group]:
    """Return the groups of moments that `probes` ask for.

    Args:
        probes: each once.
        spans: span of each block of the whole model.

    Example:
        >>> groups_of((Probe.MIDDLE_RESIDUAL,), [0, 0, 1, 1])
        [Group(probe=<Probe.MIDDLE_RESIDUAL: 'the residual of the middle block'>, block=2, span=1)]
    """
    groups = []
    for probe in probes:
        if probe is Probe.SPAN_INPUT:
            groups += [Group(probe, spans.index(span), span) for span in sorted(set(spans))]
        elif probe is Probe.MIDDLE_RESIDUAL:
            middle = len(spans) // 2
            groups.append(Group(probe, middle, spans[middle]))
        else:
            groups.append(Group(probe, 0, None))
    return groups


class Prober:
    """Takes the moments that gates ask for, of the blocks that this rank holds.

    Args:
        groups: of the vector.
        first_block: index of this rank's first block in the whole model.
        blocks: how many it holds.
        counts_tokens: False where another rank counts the same tokens.
        modulated: from the first block's arguments, its normed and modulated input
            `(batch, tokens, dim)`; None where this rank does not hold that block.

    Attributes:
        measures: whether any group is measured in this pipeline stage.
        inputs: span -> the group that measures what enters it.
        residuals: local index of a block -> the group that measures what it adds.
    """

    def __init__(
        self,
        groups: list[Group],
        first_block: int,
        blocks: int,
        counts_tokens: bool,
        modulated: Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor] | None,
    ):
        self.groups = groups
        self._modulated = modulated
        own = {i: g for i, g in enumerate(groups) if first_block <= g.block < first_block + blocks}
        self.measures = bool(own)
        if not counts_tokens:
            own = {}
        self.inputs = {g.span: i for i, g in own.items() if g.probe is Probe.SPAN_INPUT}
        modulated_groups = [i for i, g in own.items() if g.probe is Probe.MODULATED_INPUT]
        self._modulated_group = modulated_groups[0] if modulated_groups else None
        self.residuals = {
            g.block - first_block: i
            for i, g in own.items()
            if g.probe in (Probe.FIRST_RESIDUAL, Probe.MIDDLE_RESIDUAL)
        }

    def span_input(
        self,
        span: int,
        inputs: Streams,
        reference: Reference | None,
        local: LocalState,
        shared: SharedState,
    ) -> None:
        """Measure what enters a span, where a gate asks for it and this rank does so."""
        group = self.inputs.get(span)
        if group is not None:
            exponent = shared.groups[group].exponent
            local.pending[group].add_(measure(inputs.hidden_states, reference, exponent))

    def block_input(
        self,
        index: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        local: LocalState,
        shared: SharedState,
        position: Position,
    ) -> None:
        """Measure what the first block makes of its arguments, where a gate asks for it."""
        group = self._modulated_group
        if group is not None and index == 0:
            assert self._modulated is not None
            self._against_last(group, self._modulated(args, kwargs), local, shared, position)

    def block_output(
        self,
        index: int,
        inputs: Streams,
        outputs: Streams,
        local: LocalState,
        shared: SharedState,
        position: Position,
    ) -> None:
        """Measure what a block of `residuals` has added."""
        residual = outputs.hidden_states - inputs.hidden_states
        self._against_last(self.residuals[index], residual, local, shared, position)

    def _against_last(
        self,
        group: int,
        tensor: torch.Tensor,
        local: LocalState,
        shared: SharedState,
        position: Position,
    ) -> None:
        norm, exponent = self.groups[group].probe.norm, shared.groups[group].exponent
        reference = local.reference(group, position)
        local.pending[group].add_(measure(tensor, reference, exponent, norm))
        local.seen[group] = tensor

    def renew(self, local: LocalState, position: Position, all_computed: bool) -> None:
        """Make what was measured in this forward pass the reference for the next measurement."""
        for group, tensor in local.seen.items():
            probe = self.groups[group].probe
            if all_computed or probe is not Probe.FIRST_RESIDUAL:
                local.refer(group, position, Reference.of(tensor, probe.norm))
        local.seen.clear()

"""Takes the moments that gates ask for, into what this rank remembers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.measurements.moments import Reference, measure
from xfuser_fastcache.measurements.probes import MomentGroup, Probe
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import LocalState
from xfuser_fastcache.state.shared import SharedState


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
        groups: list[MomentGroup],
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

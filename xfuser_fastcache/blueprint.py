"""What a cache on one transformer is built from: plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from xfuser_fastcache.artifacts.calibration import Fitted
from xfuser_fastcache.clock.schedule import Schedule
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.config.budget import Budget
from xfuser_fastcache.consensus.collective import Consensus
from xfuser_fastcache.consensus.topology import NoPatchKeys, PatchKeys
from xfuser_fastcache.decisions.policy import Rules
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.gates.base import Rule
from xfuser_fastcache.measurements.probes import MomentGroup, groups_of
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import ForwardContract
from xfuser_fastcache.models.spans import Piece, pieces_held
from xfuser_fastcache.reports.statistics import BlockInfo
from xfuser_fastcache.state.latents import StageLatents
from xfuser_fastcache.state.prober import Prober
from xfuser_fastcache.tokens.interface import NoTokenPlan, TokenPlan


@dataclass(frozen=True)
class Blueprint:
    """A cache as it is to be put on a transformer.

    Attributes:
        config: resolved options.
        gate: says when a span may be skipped.
        forecaster: stands in for it.
        blocks: all blocks of the whole model, in order.
        contracts: contract of each block that this rank holds, in order; where the forecaster
            stands in for the whole forward pass, that of the forward pass alone.
        first_block: index in `blocks` of the first one that this rank holds.
        dim: width of a token that is measured, `hidden_states.shape[-1]`.
        fitted: what a calibration left for this model, or None.
        uncovered: for a generation that the calibration does not cover, of planned noise levels
            (None where it does not begin with the first, or they are unknown), what stands in and
            the mask that was moved to it (None without); None without a calibration.
        budget: that chose a mask of the calibration, and is spread over such a generation; or None.
        modulated: from the first block's arguments, its normed and modulated input; None where
            this rank does not hold that block.
        tokens: which tokens computed spans run on; for one stage only.
        keys: what a patch of PipeFusion attends to of the others.
        latents: at a pipeline's last stage, where something stands in for its whole forward pass;
            None elsewhere.
    """

    config: CacheConfig
    gate: Rule
    forecaster: Forecaster
    blocks: list[BlockInfo]
    contracts: Sequence[BlockContract | ForwardContract]
    first_block: int
    dim: int
    fitted: Fitted | None = None
    uncovered: Callable[[Sequence[float] | None], tuple[Forecaster, list[int] | None]] | None = None
    budget: Budget | None = None
    modulated: Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor] | None = None
    tokens: TokenPlan = field(default_factory=NoTokenPlan)
    keys: PatchKeys = field(default_factory=NoPatchKeys)
    latents: StageLatents | None = None

    def rules(self, consensus: Consensus) -> Rules:
        """Return what decisions go by."""
        spans = [block.span for block in self.blocks]
        groups = tuple(groups_of(self.gate.probes, spans))
        return Rules(
            config=self.config,
            gate=self.gate,
            spans=1 + max(spans),
            groups=groups,
            dim=self.dim,
            lag=_lag(groups, consensus),
            history=self.forecaster.depth,
            schedule=Schedule.of(self.config),
        )

    def prober(self, rules: Rules, counts_tokens: bool) -> Prober:
        """Return what takes the moments of the blocks that this rank holds."""
        held = len(self.contracts)
        return Prober(list(rules.groups), self.first_block, held, counts_tokens, self.modulated)

    def pieces(self) -> list[Piece]:
        """Return the piece of a span that each block of this rank belongs to."""
        spans = [block.span for block in self.blocks]
        return pieces_held(spans, self.first_block, len(self.contracts))

    def share_of(self, span: int) -> float:
        """Return a span's share of the cost of all blocks, 0 to 1."""
        return sum(block.cost for block in self.blocks if block.span == span)


def _lag(groups: Sequence[MomentGroup], consensus: Consensus) -> int:
    """Return by how many steps decisions lag; see the engine.

    Args:
        groups: of moments, each measured at a block.
        consensus: knows how many blocks each stage holds.
    """
    if consensus.group.stages == 1:
        return 0
    in_first_stage = sum(part.blocks for part in consensus.stages[0])
    return 1 if all(group.block < in_first_stage for group in groups) else 2

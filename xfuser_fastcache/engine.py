"""The engine: one per transformer; it alone moves between consensus, gate and forecaster.

Order of a step: the transformer's hook opens it, the consensus is taken, the gate's answers
become one flag a span, each span is computed or forecast while its moments are summed on the
device, the transformer's hook closes it.

With one pipeline stage decisions are "current": the vector is posted and awaited where the first
block is entered, and holds the first span's moments of this step and the other spans' of the
step before. With several stages they are "lagged": a rank posts step t when it closes it, and
uses it for step t + 2; by then every stage has closed step t, so nobody waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from xfuser_fastcache.backends import backend
from xfuser_fastcache.block_contract import BlockContract, Streams
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.consensus import DIGEST_BITS, Consensus, ConsensusError, GatherTicket, Header
from xfuser_fastcache.decisions import DecisionLog
from xfuser_fastcache.gates.base import Evidence
from xfuser_fastcache.layout import Position
from xfuser_fastcache.moments import SLOTS, Moments, Reference, measure
from xfuser_fastcache.state import (
    Anchor,
    BranchState,
    Memory,
    Sighting,
    SpanState,
    rescaled,
)
from xfuser_fastcache.statistics import BlockInfo, Counters
from xfuser_fastcache.timeline import Call, Schedule, Timeline
from xfuser_fastcache.watchdog import Watchdog

logger = logging.getLogger("xfuser_fastcache")

# A pipeline's decisions rest on the vector of two steps before; see DESIGN, consensus, timing.
LAG = 2


@dataclass(frozen=True)
class Piece:
    """The consecutive blocks of one span that this rank holds.

    Attributes:
        span: index of the span in the whole model.
        first, last: local indices of its blocks on this rank.
    """

    span: int
    first: int
    last: int


def span_of_blocks(blocks: int, granularity: int | str) -> list[int]:
    """Return the span of each block of the whole model; no more spans than blocks.

    Example:
        >>> span_of_blocks(5, 2), span_of_blocks(3, "stack"), span_of_blocks(3, "block")
        ([0, 0, 0, 1, 1], [0, 0, 0], [0, 1, 2])
    """
    named = {"stack": 1, "block": blocks}
    spans = named[granularity] if isinstance(granularity, str) else min(granularity, blocks)
    return [index * spans // blocks for index in range(blocks)]


class CacheEngine:
    """Skips spans of one transformer's blocks, in step with every rank of the decision group.

    Args:
        config: validated options.
        consensus: of the decision group.
        blocks: all blocks of the whole model, in order.
        contracts: contract of each block that this rank holds, in order.
        first_block: index in `blocks` of the first one that this rank holds.
        dim: width of a token, `hidden_states.shape[-1]`.
    """

    def __init__(
        self,
        config: CacheConfig,
        consensus: Consensus,
        blocks: list[BlockInfo],
        contracts: list[BlockContract],
        first_block: int,
        dim: int,
    ):
        self.config = config
        self.consensus = consensus
        self.blocks = blocks
        self.contracts = contracts
        self.dim = dim
        chosen = backend(config.use_cache)
        self.gate = chosen.gate(config)
        self.forecaster = chosen.forecaster(config)
        self.span_count = 1 + max(block.span for block in blocks)
        spans = [blocks[first_block + i].span for i in range(len(contracts))]
        self.pieces = [
            Piece(span, spans.index(span), len(spans) - 1 - spans[::-1].index(span))
            for span in spans
        ]
        self.lagged = consensus.group.stages > 1
        self.timeline = Timeline(config.num_steps)
        self.decisions = DecisionLog(self.span_count)
        self.counters = Counters(consensus, self.span_count)
        self.branches: dict[int, BranchState] = {}
        self.call: Call | None = None
        self.watchdog = Watchdog(config.sync_timeout_s, consensus.absent)
        self._owes_consensus = False
        self._entered: Streams | None = None
        self._said: set[str] = set()
        self._verifications: list[GatherTicket] = []

    # ---- called by the transformer's hook ---------------------------------------------------

    def open(
        self,
        timestep: float,
        noise_level: float,
        signature: object,
        position: Position,
        device: torch.device,
        schedule: Schedule | None = None,
        branch_name: str | None = None,
    ) -> None:
        """Begin a forward pass of the transformer; see `Timeline.open` for the arguments."""
        call = self.timeline.open(timestep, noise_level, signature, position, schedule, branch_name)
        if call.starts_generation:
            self.finish()
            self.branches.clear()
            self.decisions.begin_generation()
        if call.branch not in self.branches:
            pending = torch.zeros(self.span_count, SLOTS, dtype=torch.int64, device=device)
            spans = [SpanState() for _ in range(self.span_count)]
            self.branches[call.branch] = BranchState(spans, pending)
        self.call = call
        self.watchdog.expect(call.place)
        if not call.opens_step:
            return
        if self.lagged:
            branch = self.branches[call.branch]
            if len(branch.tickets) >= LAG:
                self._receive(branch)
            self._decide(branch, call)
            branch.sightings = [self._sighting(span, call) for span in branch.spans]
            self._move_anchors(branch, call)
        else:
            self._owes_consensus = True

    def close(self) -> None:
        """End a forward pass."""
        call, branch = self._current()
        if self._owes_consensus:
            # No block ran here; the other ranks wait all the same.
            self._take_consensus(branch, call)
        if self.lagged and call.position.is_last_patch:
            self._post(branch, call)
        self.counters.peak_bytes = max(self.counters.peak_bytes, self.cache_bytes())
        self.call = None
        if call.more_steps_follow:
            self.watchdog.expect(f"the communication after {call.place}")
        else:
            self.watchdog.rest()
        if call.is_last_step and call.position.is_last_patch:
            self._verify()
            if not self.lagged:
                self._complete_verifications()

    def abandon(self, error: BaseException) -> None:
        """Leave a forward pass that raised `error`; the next one starts a new generation.

        Raises:
            ConsensusTimeout: from `error`, where it is a broken or timed-out communication.
        """
        place = "a forward pass" if self.call is None else self.call.place
        self.call = None
        self._owes_consensus = False
        self.timeline.restart()
        self.watchdog.rest()
        if isinstance(error, RuntimeError) and not isinstance(error, ConsensusError):
            self.consensus.explain(error, place)

    # ---- called by the block hooks ----------------------------------------------------------

    def run_block(
        self,
        index: int,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run one block, or stand in for it.

        A skipped span is forecast at its last block, so that whatever the model adds between
        blocks finds its place; the blocks before it hand their input on.

        Args:
            index: of the block among those of this rank.
            forward: the block's own forward.
            args, kwargs: its arguments.
        """
        if self.call is None:
            self._warn_once(
                "A cached block runs outside of its transformer's hooked forward, uncached. If "
                "xfuser has wrapped the transformer since the cache was applied, call remove_cache "
                "on the old one and apply the cache to the pipeline's transformer again."
            )
            return forward(*args, **kwargs)
        piece, contract = self.pieces[index], self.contracts[index]
        if index == piece.first:
            self._enter(piece.span, contract.read(args, kwargs))
        call, branch = self._current()
        if branch.skip[piece.span]:
            if index < piece.last:
                return contract.pack(contract.read(args, kwargs))
            memory = branch.memory(piece.span, call.position)
            assert self._entered is not None
            return contract.pack(self.forecaster.forecast(memory, self._entered, call.noise_level))
        output = forward(*args, **kwargs)
        if index == piece.last:
            self._leave(piece.span, contract.unpack(output))
        return output

    def _enter(self, span: int, inputs: Streams) -> None:
        """Measure what enters a span; at the step's first block, then decide."""
        call, branch = self._current()
        if self.consensus.group.counts_tokens:
            memory = branch.memory(span, call.position)
            reference = memory.anchors[0].reference if memory.anchors else None
            branch.pending[span] += measure(
                inputs.hidden_states, reference, branch.spans[span].exponent
            )
        if self._owes_consensus:
            self._take_consensus(branch, call)
        # A later pipeline stage reads from a receive buffer that the next patch overwrites.
        self._entered = inputs if branch.skip[span] else inputs.map(torch.clone)

    def _leave(self, span: int, outputs: Streams) -> None:
        """Remember a computed span."""
        call, branch = self._current()
        assert self._entered is not None
        anchor = Anchor(
            noise_level=call.noise_level,
            inputs=self._entered,
            residual=outputs.map(torch.sub, self._entered),
            reference=Reference.of(self._entered.hidden_states),
        )
        memory = branch.memory(span, call.position)
        if branch.poisoned:
            # Its anchors may hold the NaN; a forecaster that looks back would bring it up again.
            memory = Memory()
        branch.remember(span, call.position, self.forecaster.update(memory, anchor))

    def _current(self) -> tuple[Call, BranchState]:
        assert self.call is not None
        return self.call, self.branches[self.call.branch]

    # ---- decisions: functions of reduced vectors and of nothing else -------------------------

    def _take_consensus(self, branch: BranchState, call: Call) -> None:
        """Post, await and decide at once; the first span's moments are this step's."""
        self._owes_consensus = False
        branch.sightings[0] = self._sighting(branch.spans[0], call)
        self._post(branch, call)
        self._receive(branch)
        self._decide(branch, call)
        branch.sightings = [self._sighting(span, call) for span in branch.spans]
        self._move_anchors(branch, call)

    def _sighting(self, span: SpanState, call: Call) -> Sighting:
        return Sighting(span.exponent, call.noise_level, span.anchor_level)

    def _post(self, branch: BranchState, call: Call) -> None:
        digest = self.decisions.bits(DIGEST_BITS)
        header = Header(call.generation, call.step, call.branch, digest)
        ticket = self.consensus.post(header, branch.pending)
        branch.tickets.append((ticket, branch.sightings))
        branch.sightings = [None] * self.span_count
        branch.pending.zero_()

    def _receive(self, branch: BranchState) -> None:
        """Take in the oldest posted vector."""
        ticket, sightings = branch.tickets.pop(0)
        groups = self.consensus.wait(ticket)
        broken = 0
        for span, group, sighting in zip(branch.spans, groups, sightings, strict=True):
            if sighting is None:
                span.moments = None
                continue
            moments = Moments.decode(group, sighting.exponent)
            span.moments = (moments, sighting)
            span.exponent = moments.next_exponent(sighting.exponent)
            broken += moments.nonfinite + moments.overflow
        branch.poisoned = broken > 0
        if broken:
            self.counters.nonfinite_steps += 1
            self._warn_once(
                "A statistic is NaN, infinite or too large for some tokens: all blocks are "
                "computed at the next decision. Counted as nonfinite_steps."
            )

    def _decide(self, branch: BranchState, call: Call) -> None:
        """Turn reduced numbers into one flag per span."""
        config = self.config
        compute_all = (
            not config.enable_block_approx
            or call.step < config.num_warmup_steps
            or call.is_last_step
            or branch.poisoned
            or (self.lagged and not call.position.patched)
        )
        branch.skip = [
            not compute_all
            and span.skips_in_a_row < config.max_consecutive_skips
            and self._may_skip(span, call.noise_level)
            for span in branch.spans
        ]
        for span, skip in zip(branch.spans, branch.skip, strict=True):
            span.skips_in_a_row = span.skips_in_a_row + 1 if skip else 0
        self.counters.record(call.step, call.branch, branch.skip)
        self.decisions.record(call.generation, call.step, call.branch, branch.skip)

    def _may_skip(self, span: SpanState, noise_level: float) -> bool:
        if span.moments is None or span.anchor_level is None:
            return False
        moments, sighting = span.moments
        if sighting.anchor_level is None or moments.tokens == 0:
            return False
        moments = rescaled(moments, sighting, noise_level, span.anchor_level)
        return self.gate.may_skip(
            Evidence(
                moments.change,
                moments.change_squared,
                moments.reference,
                moments.tokens,
                self.dim,
            )
        )

    def _move_anchors(self, branch: BranchState, call: Call) -> None:
        """Note which spans get a new anchor at this step, on all ranks."""
        for span, skip in zip(branch.spans, branch.skip, strict=True):
            if not skip:
                span.anchor_level = call.noise_level

    def _warn_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s (Said once.)", message)

    # ---- between generations ----------------------------------------------------------------

    def settle(self) -> None:
        """Complete all outstanding collectives, in the order in which they were posted."""
        tickets = [t for branch in self.branches.values() for t, _ in branch.tickets]
        for ticket in sorted(tickets, key=lambda t: t.sequence):
            self.consensus.wait(ticket)
        for branch in self.branches.values():
            branch.tickets.clear()

    def finish(self) -> None:
        """Complete a generation: nothing of it reaches into the next.

        Raises:
            ConsensusError: with `verify_consensus`, ranks decided differently.
        """
        self.settle()
        self._complete_verifications()
        self._verify()

    def _verify(self) -> None:
        """Post the comparison of decisions; a pipeline's stages complete it at their next turn."""
        row = self.decisions.unverified() if self.config.verify_consensus else None
        if row is not None:
            self._verifications.append(
                self.consensus.post_gather(row, "the comparison of decisions")
            )

    def _complete_verifications(self) -> None:
        while self._verifications:
            self.decisions.compare(self.consensus.wait_gather(self._verifications.pop(0)))

    def shut_down(self) -> None:
        """End for good; with `verify_consensus` all ranks meet here."""
        self.finish()
        self._complete_verifications()
        self.branches.clear()
        self.watchdog.close()
        self.consensus.close()

    def cache_bytes(self) -> int:
        """Bytes that this rank's anchors occupy now."""
        return sum(branch.nbytes() for branch in self.branches.values())

    def statistics(self) -> dict[str, Any]:
        """Return the counters; waits for what is outstanding, calls no collective."""
        self.settle()
        return {
            "use_cache": self.config.use_cache,
            **self.counters.as_dict(self.blocks),
            "decisions_digest": self.decisions.hexdigest(),
        }

    def reset_statistics(self) -> None:
        """Start the counters anew; decisions and anchors stay."""
        self.counters = Counters(self.consensus, self.span_count)

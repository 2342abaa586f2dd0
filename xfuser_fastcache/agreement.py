"""Decisions: flags from reduced vectors and from nothing else, so that all ranks have the same.

No tensor of this rank, no clock and no random number is seen here; the moments to post pass
through unread. What an `Agreement` holds is therefore equal on every rank of the group at equal
places, and each vector carries a digest of its decisions to prove it.
"""

from __future__ import annotations

import logging

import torch

from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.consensus import DIGEST_BITS, Consensus, GatherTicket, Header
from xfuser_fastcache.decisions import (
    CHANGED,
    LAST_STEP,
    NO_ANCHOR,
    NOT_FINITE,
    NOT_MEASURED,
    OFF,
    STEPS_MASK,
    SYNCHRONOUS,
    TOO_OLD,
    UNCHANGED,
    WARM_UP,
    Decision,
    DecisionLog,
    Judgement,
)
from xfuser_fastcache.gates.base import Evidence, Gate
from xfuser_fastcache.moments import Moments
from xfuser_fastcache.state import Orders, SharedState, Sighting, SpanState, rescaled
from xfuser_fastcache.statistics import Counters
from xfuser_fastcache.timeline import Call
from xfuser_fastcache.tokens.saliency import MotionRule

logger = logging.getLogger("xfuser_fastcache")


class Agreement:
    """Turns what the gate says into one flag per span and step, alike on every rank.

    Args:
        config: validated options.
        consensus: of the decision group.
        gate: of the backend.
        spans: number of spans of the whole model.
        dim: width of a token.
        lag: a decision rests on the vector of so many steps before; 0 for the step's own.
        motion: turns the token counts of all ranks into one; None without a token split.

    Attributes:
        decisions: the log of flags.
        counters: for the statistics.
    """

    def __init__(
        self,
        config: CacheConfig,
        consensus: Consensus,
        gate: Gate,
        spans: int,
        dim: int,
        lag: int,
        motion: MotionRule | None = None,
    ):
        self.config = config
        self.consensus = consensus
        self.gate = gate
        self.dim = dim
        self.lag = lag
        self.motion = motion
        self.decisions = DecisionLog(spans)
        self.counters = Counters(consensus, spans)
        self.branches: dict[int, SharedState] = {}
        self._first_level = 1.0
        self._verifications: list[GatherTicket] = []
        self._warned = False

    def begin_generation(self) -> None:
        """Forget the generation before, after completing what is outstanding.

        Raises:
            ConsensusError: with `verify_consensus`, ranks decided differently in it.
        """
        self.finish()
        self.branches.clear()
        self.decisions.begin_generation()

    def branch(self, index: int) -> SharedState:
        """Return the shared state of a CFG branch of this generation."""
        if index not in self.branches:
            self.branches[index] = SharedState([SpanState() for _ in range(self.decisions.spans)])
        return self.branches[index]

    # ---- the two timings ---------------------------------------------------------------------

    def decide_now(self, call: Call, pending: torch.Tensor) -> None:
        """Post, await and decide at once; the first span's moments are this step's."""
        shared = self.branch(call.branch)
        shared.sightings[0] = _sighting(shared.spans[0], call)
        self.post(call, pending)
        self._receive(shared)
        self._decide(shared, call)

    def decide_lagged(self, call: Call) -> None:
        """Decide from the vector of `lag` steps before, which every stage has posted by now."""
        shared = self.branch(call.branch)
        self._receive_due(shared)
        self._decide(shared, call)

    def orders(self, call: Call, following: Call | None = None) -> Orders:
        """Return what a forward pass is to do, after its step was decided.

        Args:
            call: the forward pass.
            following: the next step of its branch, where this pass acts on the next decision; see
                the engine. Nothing is recorded of it: it is decided when it opens.
        """
        shared = self.branch(call.branch)
        if following is None or shared.forced:
            return shared.orders
        self._receive_due(shared)
        judgements, _ = self._judgements(shared, following)
        return Orders([judged.skip for judged in judgements], shared.poisoned)

    def post(self, call: Call, pending: torch.Tensor) -> None:
        """Send the moments measured since the last post on their way, and start them anew.

        Args:
            call: the step that they are posted at.
            pending: int64 `(spans, SLOTS)`, and more groups for token counts; zeroed here.
        """
        shared = self.branch(call.branch)
        digest = self.decisions.bits(DIGEST_BITS)
        header = Header(call.generation, call.step, call.branch, digest)
        shared.tickets.append((self.consensus.post(header, pending), shared.sightings))
        shared.sightings = [None] * len(shared.spans)
        pending.zero_()

    # ---- from a vector to flags --------------------------------------------------------------

    def _receive_due(self, shared: SharedState) -> None:
        """Take in the vector of `lag` steps before, unless that was done."""
        if len(shared.tickets) >= self.lag:
            self._receive(shared)

    def _receive(self, shared: SharedState) -> None:
        """Take in the oldest posted vector."""
        ticket, sightings = shared.tickets.pop(0)
        waited_s = self.consensus.wait_s
        groups = self.consensus.wait(ticket)
        groups, counts = groups[: len(shared.spans)], groups[len(shared.spans) :]
        shared.token_counts = [slot for group in counts for slot in group]
        shared.waited_s += self.consensus.wait_s - waited_s
        broken = 0
        for span, group, sighting in zip(shared.spans, groups, sightings, strict=True):
            if sighting is None:
                span.moments = None
                continue
            moments = Moments.decode(group, sighting.exponent)
            span.moments = (moments, sighting)
            span.exponent = moments.next_exponent(sighting.exponent)
            broken += moments.nonfinite + moments.overflow
        shared.poisoned = broken > 0
        if broken:
            self.counters.nonfinite_steps += 1
            if not self._warned:
                self._warned = True
                logger.warning(
                    "A statistic is NaN, infinite or too large for some tokens: all blocks are "
                    "computed at the next decision. Counted as nonfinite_steps; said once."
                )

    def _decide(self, shared: SharedState, call: Call) -> None:
        """Turn reduced numbers into one flag per span, and keep the books."""
        judgements, shared.forced = self._judgements(shared, call)
        skip = [judged.skip for judged in judgements]
        warm_up = call.step < self.config.num_warmup_steps
        all_tokens = warm_up or call.is_last_step or shared.poisoned
        shared.orders = Orders(skip, shared.poisoned, all_tokens, self._moving(shared, call))
        self.counters.record(call.step, call.branch, skip)
        self.decisions.record(Decision(call, judgements, shared.waited_s))
        shared.waited_s = 0.0
        shared.sightings = [_sighting(span, call) for span in shared.spans]
        for span, skipped in zip(shared.spans, skip, strict=True):
            if not skipped:
                # Anchors that are distrusted are forgotten; see `Orders`.
                span.older_level = None if shared.poisoned else span.anchor_level
                span.anchor_level, span.anchor_step = call.noise_level, call.step

    def _moving(self, shared: SharedState, call: Call) -> int:
        """Return how many tokens move on the rank where most do."""
        if call.starts_generation:
            self._first_level = call.noise_level
        if self.motion is None:
            return 0
        edges = len(self.motion.edges)
        ranks = self.consensus.group.world_size
        counts = [shared.token_counts[edges * r : edges * (r + 1)] for r in range(ranks)]
        time = call.noise_level / self._first_level if self._first_level else 0.0
        return self.motion.moving(counts, time)

    def _judgements(self, shared: SharedState, call: Call) -> tuple[list[Judgement], bool]:
        """Return a judgement a span, and whether all are computed without asking the gate."""
        forced = self._reason_to_compute(shared, call)
        if forced:
            return [Judgement(False, forced)] * len(shared.spans), True
        return [self._judge(span, call) for span in shared.spans], False

    def _reason_to_compute(self, shared: SharedState, call: Call) -> str | None:
        """Return why all spans are computed at this step, or None."""
        if not self.config.enable_block_approx:
            return OFF
        if self.config.steps_mask is not None:
            if self.config.steps_mask[call.planned_step]:
                return STEPS_MASK
        elif call.step < self.config.num_warmup_steps:
            return WARM_UP
        elif call.is_last_step:
            return LAST_STEP
        if shared.poisoned:
            return NOT_FINITE
        return SYNCHRONOUS if self.lag and not call.position.patched else None

    def _judge(self, span: SpanState, call: Call) -> Judgement:
        """Ask the gate about one span, where there is anything to ask."""
        if span.anchor_level is None or span.anchor_step is None:
            return Judgement(False, NO_ANCHOR)
        if self.config.steps_mask is not None:
            return Judgement(True, STEPS_MASK)
        # Steps that the branch was left out at make its anchor older as skipped ones do.
        if call.step - span.anchor_step > self.config.max_consecutive_skips:
            return Judgement(False, TOO_OLD)
        if span.moments is None:
            return Judgement(False, NOT_MEASURED)
        moments, sighting = span.moments
        if sighting.anchor_level is None or moments.tokens == 0:
            return Judgement(False, NOT_MEASURED)
        moments = rescaled(moments, sighting, call.noise_level, span.anchor_level)
        verdict = self.gate.judge(
            Evidence(
                change=moments.change,
                change_squared=moments.change_squared,
                reference=moments.reference,
                tokens=moments.tokens,
                dim=self.dim,
                lag=call.step - span.anchor_step,
                noise_levels=(call.noise_level, span.anchor_level, span.older_level),
            )
        )
        reason = UNCHANGED if verdict.may_skip else CHANGED
        return Judgement(verdict.may_skip, reason, verdict.statistic, verdict.threshold)

    # ---- the end of a generation -------------------------------------------------------------

    def finish(self) -> None:
        """Complete a generation: nothing of it reaches into the next.

        After a failed wait there is nothing that could be completed; the next vector says so again.

        Raises:
            ConsensusError: with `verify_consensus`, ranks decided differently.
        """
        tickets = [t for shared in self.branches.values() for t, _ in shared.tickets]
        for shared in self.branches.values():
            shared.tickets.clear()
        if self.consensus.broken:
            self._verifications.clear()
            return
        for ticket in sorted(tickets, key=lambda ticket: ticket.sequence):
            self.consensus.wait(ticket)
        self.complete_verifications()
        self.verify()

    def verify(self) -> None:
        """Post the comparison of decisions; a pipeline's stages complete it at their next turn."""
        row = self.decisions.unverified() if self.config.verify_consensus else None
        if row is not None:
            ticket = self.consensus.post_gather(row, "the comparison of decisions")
            self._verifications.append(ticket)

    def complete_verifications(self) -> None:
        """Await posted comparisons.

        Raises:
            ConsensusError: ranks decided differently.
        """
        while self._verifications:
            self.decisions.compare(self.consensus.wait_gather(self._verifications.pop(0)))


def _sighting(span: SpanState, call: Call) -> Sighting:
    return Sighting(span.exponent, call.noise_level, span.anchor_level)

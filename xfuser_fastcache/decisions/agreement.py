"""Agreement: vectors go out and come back, and what they decide is kept alike on all ranks.

No tensor of this rank, no clock and no random number is seen here; the moments to post pass
through unread. What an `Agreement` holds is therefore equal on every rank of the group at equal
places, and each vector carries a digest of its decisions to prove it.
"""

from __future__ import annotations

import logging

import torch

from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.consensus.collective import Consensus
from xfuser_fastcache.consensus.header import DIGEST_BITS, Header
from xfuser_fastcache.consensus.transfer import GatherTicket
from xfuser_fastcache.decisions import policy
from xfuser_fastcache.decisions.audits import audit_of, did_harm
from xfuser_fastcache.decisions.few_steps import FewSteps
from xfuser_fastcache.decisions.log import (
    FIRST_BLOCK,
    NOT_FINITE,
    TOO_LARGE,
    Decision,
    DecisionLog,
)
from xfuser_fastcache.decisions.policy import Rules
from xfuser_fastcache.measurements.moments import Moments
from xfuser_fastcache.reports.statistics import Counters
from xfuser_fastcache.state.shared import (
    GroupState,
    Mark,
    Posted,
    SharedState,
    SpanState,
    StepPlan,
)
from xfuser_fastcache.tokens.saliency import MotionStatic

logger = logging.getLogger("xfuser_fastcache")


class Agreement:
    """Turns what the gate says into one flag per span and step, alike on every rank.

    Args:
        rules: that decisions go by.
        consensus: of the decision group.
        motion: turns the token counts of all ranks into one; None without a token split.

    Attributes:
        few_steps: warns where nothing can be skipped.
        decisions: the log of flags.
        counters: for the statistics.
    """

    def __init__(self, rules: Rules, consensus: Consensus, motion: MotionStatic | None = None):
        self.rules = rules
        self.config = rules.config
        self.consensus = consensus
        self.motion = motion
        self._foregone = rules.foregone and motion is None
        self.few_steps = FewSteps(rules)
        self.decisions = DecisionLog(rules.spans)
        self.counters = Counters(consensus.usage, rules.spans)
        self.branches: dict[int, SharedState] = {}
        self._first_level = 1.0
        self._verifications: list[GatherTicket] = []
        self._warned = False
        # Whether the generation was left in the middle; then other ranks may not have posted.
        self._left = False

    def begin_generation(self, call: Call) -> None:
        """Forget the generation before, after completing what is outstanding.

        Args:
            call: its first forward pass.

        Raises:
            ConsensusError: with `verify_consensus`, ranks decided differently in it.
        """
        self.finish()
        self._left = False
        self.branches.clear()
        self.decisions.begin_generation()
        self.few_steps.begin(call)

    def branch(self, index: int) -> SharedState:
        """Return the shared state of a CFG branch of this generation."""
        if index not in self.branches:
            spans = [SpanState(gate_state=self.rules.gate.init()) for _ in range(self.rules.spans)]
            self.branches[index] = SharedState(spans, [GroupState() for _ in self.rules.groups])
        return self.branches[index]

    # ---- the two timings ---------------------------------------------------------------------

    def decide_now(self, call: Call, pending: torch.Tensor) -> None:
        """Post, await and decide at once; moments of the first span are this step's.

        A foregone decision awaits nothing; see `open_foregone`. But a branch's first step awaits
        all ranks, which must have been given the same.
        """
        shared = self.branch(call.branch)
        for index in self.rules.current:
            shared.sightings[index] = policy.sighting(self.rules, shared, index, call)
        first = shared.previous is None
        self.post(call, pending)
        if not self._foregone:
            self._receive(shared)
        elif first and self.consensus.group.world_size > 1:
            self.consensus.wait(shared.posted[-1].ticket)
        self._decide(shared, call)

    def open_foregone(self, call: Call) -> None:
        """Where decisions are foregone, take in the vector of the step before as a step opens.

        It has arrived by now, so that the host need not wait for the device.
        """
        shared = self.branch(call.branch)
        if self._foregone and shared.posted:
            self._receive(shared)

    def decide_lagged(self, call: Call) -> None:
        """Decide from the vector of `lag` steps before, which every stage has posted by now."""
        shared = self.branch(call.branch)
        self._receive_due(shared)
        self._decide(shared, call)

    def step_plan(self, call: Call, ahead: bool = False, following: Call | None = None) -> StepPlan:
        """Return what a forward pass is to do, after its step was decided.

        Args:
            call: the forward pass.
            ahead: whether it acts on the decision of the next step of its branch; see the engine.
                Nothing is recorded of that: it is decided when it opens.
            following: that step; None after the last one and where no plan is known.
        """
        shared = self.branch(call.branch)
        if not ahead or shared.forced:
            return shared.step_plan
        if following is None:
            # A last step that a schedule computes on its own was computed in the step before.
            last = call.is_last_step and not shared.poisoned
            schedule = self.rules.schedule if last else None
            done = schedule is not None and schedule.computes(call, before=1) is False
            return StepPlan([True] * len(shared.spans)) if done else shared.step_plan
        self._receive_due(shared)
        judgements, _ = policy.judge(self.rules, shared, following)
        return StepPlan([judged.skip for judged in judgements], bool(shared.poisoned))

    def post(self, call: Call, pending: torch.Tensor) -> None:
        """Send the moments measured since the last post on their way, and start them anew.

        Args:
            call: the step that they are posted at.
            pending: int64, see `LocalState`; zeroed here.
        """
        shared = self.branch(call.branch)
        digest = self.decisions.bits(DIGEST_BITS)
        group = self.consensus.group
        # Where guidance is parallel, each rank runs a branch of its own.
        name = "" if group.branch is not None else f", branch {call.name!r}"
        # Replicas that share weights may draw pictures of other sizes.
        setup = f"{call.setup}{name}" if group.together == group.ranks else ""
        header = Header(call.generation, call.step, call.branch, digest, setup)
        ticket = self.consensus.post(header, pending)
        shared.posted.append(Posted(ticket, shared.sightings, shared.audit))
        shared.sightings, shared.audit = [None] * len(shared.groups), None
        pending.zero_()

    # ---- from a vector to flags --------------------------------------------------------------

    def _receive_due(self, shared: SharedState) -> None:
        """Take in the vector of `lag` steps before, unless that was done."""
        if len(shared.posted) >= self.rules.lag:
            self._receive(shared)

    def _receive(self, shared: SharedState) -> None:
        """Take in the oldest posted vector."""
        ticket, sightings, audit = shared.posted.pop(0)
        waited_s = self.consensus.wait_s
        reduced = self.consensus.wait(ticket)
        reduced, below = reduced[: len(shared.groups)], reduced[len(shared.groups) :]
        shared.token_counts = [slot for group in below for slot in group]
        if audit is not None:
            error = Moments.decode(below[0], audit.exponent)
            if error.tokens:  # else the span was not called
                harmful = did_harm(error, self.config.cache_ratio_threshold)
                self.counters.record_audit(ticket.header.generation, harmful)
        shared.waited_s += self.consensus.wait_s - waited_s
        nonfinite = overflow = 0
        for group, numbers, sighting in zip(shared.groups, reduced, sightings, strict=True):
            if sighting is None:
                group.moments = None
                continue
            moments = Moments.decode(numbers, sighting.exponent)
            group.moments = (moments, sighting)
            group.exponent = moments.next_exponent(sighting.exponent)
            # What is too large to be measured does not matter where nothing rests on it.
            nonfinite += moments.nonfinite
            overflow += 0 if self.rules.unasked else moments.overflow
        shared.poisoned = NOT_FINITE if nonfinite else TOO_LARGE if overflow else None
        if shared.poisoned:
            self.counters.nonfinite_steps += 1
            if not self._warned:
                self._warned = True
                logger.warning(
                    "A statistic is NaN, infinite or too large for some tokens: all blocks are "
                    "computed at the next decision. Counted as nonfinite_steps; said once."
                )

    def _decide(self, shared: SharedState, call: Call) -> None:
        """Turn reduced numbers into one flag per span, and keep the books."""
        rules = self.rules
        judgements, shared.forced = policy.judge(rules, shared, call)
        skip = [judged.skip for judged in judgements]
        distrust = bool(shared.poisoned)
        all_tokens = rules.warms_up(call) or call.is_last_step or distrust
        shared.step_plan = StepPlan(skip, distrust, all_tokens, self._moving(shared, call))
        self.counters.record(call, skip)
        computed = any(not j.skip and j.reason != FIRST_BLOCK for j in judgements)
        if rules.schedule is not None and rules.schedule.exceeded(call, computed):
            self.counters.forced_beyond_budget += 1
        self.decisions.record(Decision(call, judgements, shared.waited_s))
        shared.waited_s = 0.0
        shared.sightings = [
            policy.sighting(rules, shared, index, call) for index in range(len(shared.groups))
        ]
        for index, span in enumerate(shared.spans):
            if span.gate_state is not None and span.anchor is not None:
                found = policy.evidence(rules, shared, index, call, span.anchor)
                span.gate_state = rules.gate.learn(span.gate_state, found, skip[index])
        shared.audit = audit_of(rules, shared, call, skip)
        now = Mark(call.noise_level, call.step)
        for span, skipped in zip(shared.spans, skip, strict=True):
            if not skipped:
                # Anchors that are distrusted are forgotten; see `StepPlan`.
                older = None if shared.poisoned else span.anchor
                span.older_level = None if older is None else older.noise_level
                span.anchor = now
        shared.previous = now
        if not any(skip):
            shared.computed = now

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

    # ---- the end of a generation -------------------------------------------------------------

    def leave(self) -> None:
        """Take in that an exception has ended the generation on this rank."""
        self._left = True

    def finish(self) -> None:
        """Complete a generation: nothing of it reaches into the next.

        What was posted in a generation that was left is not awaited: other ranks may have left it
        elsewhere. If so, the next vector says it.

        Raises:
            ConsensusError: with `verify_consensus`, ranks decided differently.
        """
        tickets = [posted.ticket for shared in self.branches.values() for posted in shared.posted]
        for shared in self.branches.values():
            shared.posted.clear()
        if self._left:
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
            ticket = self.consensus.post_gather(row.tolist(), "the comparison of decisions")
            self._verifications.append(ticket)

    def complete_verifications(self) -> None:
        """Await posted comparisons.

        Raises:
            ConsensusError: ranks decided differently.
        """
        while self._verifications:
            self.decisions.compare(self.consensus.wait_gather(self._verifications.pop(0)))

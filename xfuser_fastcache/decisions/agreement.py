"""Decisions: flags from reduced vectors and from nothing else, so that all ranks have the same.

No tensor of this rank, no clock and no random number is seen here; the moments to post pass
through unread. What an `Agreement` holds is therefore equal on every rank of the group at equal
places, and each vector carries a digest of its decisions to prove it.
"""

from __future__ import annotations

import hashlib
import logging

import torch

from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.consensus.collective import DIGEST_BITS, Consensus, GatherTicket, Header
from xfuser_fastcache.decisions.log import (
    CHANGED,
    FIRST_BLOCK,
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
from xfuser_fastcache.gates.base import Evidence, Evidences, Rule
from xfuser_fastcache.measurements.moments import Moments
from xfuser_fastcache.measurements.probes import MomentGroup, Probe
from xfuser_fastcache.reports.statistics import Counters
from xfuser_fastcache.state.shared import (
    Audit,
    GroupState,
    Mark,
    Posted,
    SharedState,
    Sighting,
    SpanState,
    StepPlan,
    rescaled,
)
from xfuser_fastcache.tokens.saliency import MotionStatic

logger = logging.getLogger("xfuser_fastcache")

_NOTHING = Moments(0.0, 0.0, 0.0, tokens=0, nonfinite=0, overflow=0)


class Agreement:
    """Turns what the gate says into one flag per span and step, alike on every rank.

    Args:
        config: validated options.
        consensus: of the decision group.
        gate: of the backend.
        spans: number of spans of the whole model.
        groups: of moments in the vector, as the gate's probes ask for them.
        dim: width of a token.
        lag: a decision rests on the vector of so many steps before; 0 for the step's own.
        motion: turns the token counts of all ranks into one; None without a token split.

    Attributes:
        decides_at: index of the first span that is decided: 1 where the gate has to see the first
            block's output, which is then always computed; else 0.
        decisions: the log of flags.
        counters: for the statistics.
    """

    def __init__(
        self,
        config: CacheConfig,
        consensus: Consensus,
        gate: Rule,
        spans: int,
        groups: list[MomentGroup],
        dim: int,
        lag: int,
        motion: MotionStatic | None = None,
    ):
        self.config = config
        self.consensus = consensus
        self.gate = gate
        self.groups = groups
        self.dim = dim
        self.lag = lag
        self.motion = motion
        self.decides_at = int(Probe.FIRST_RESIDUAL in gate.probes)
        # Measured before a step is decided, where nothing lags; the other groups after it.
        self._current = [
            index
            for index, group in enumerate(groups)
            if (group.span or 0) <= self.decides_at and group.probe is not Probe.MIDDLE_RESIDUAL
        ]
        # Of each span, the groups that its decision rests on.
        self._weighed = [
            [
                index
                for index, group in enumerate(groups)
                if group.probe is not Probe.SPAN_INPUT or group.span == span
            ]
            for span in range(spans)
        ]
        self._learns = gate.init() is not None
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
            spans = [SpanState(gate_state=self.gate.init()) for _ in range(self.decisions.spans)]
            self.branches[index] = SharedState(spans, [GroupState() for _ in self.groups])
        return self.branches[index]

    # ---- the two timings ---------------------------------------------------------------------

    def decide_now(self, call: Call, pending: torch.Tensor) -> None:
        """Post, await and decide at once; moments of the first span are this step's."""
        shared = self.branch(call.branch)
        for index in self._current:
            shared.sightings[index] = self._sighting(shared, index, call)
        self.post(call, pending)
        self._receive(shared)
        self._decide(shared, call)

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
            # A last step that a mask computes on its own was computed in the step before.
            mask = self.config.steps_mask if call.is_last_step and not shared.poisoned else None
            done = mask is not None and not mask[call.planned_step - 1]
            return StepPlan([True] * len(shared.spans)) if done else shared.step_plan
        self._receive_due(shared)
        judgements, _ = self._judgements(shared, following)
        return StepPlan([judged.skip for judged in judgements], shared.poisoned)

    def post(self, call: Call, pending: torch.Tensor) -> None:
        """Send the moments measured since the last post on their way, and start them anew.

        Args:
            call: the step that they are posted at.
            pending: int64, see `LocalState`; zeroed here.
        """
        shared = self.branch(call.branch)
        digest = self.decisions.bits(DIGEST_BITS)
        header = Header(call.generation, call.step, call.branch, digest)
        ticket = self.consensus.post(header, pending)
        shared.posted.append(Posted(ticket, shared.sightings, shared.audit))
        shared.sightings, shared.audit = [None] * len(shared.groups), None
        pending.zero_()

    # ---- from a vector to flags --------------------------------------------------------------

    def _receive_due(self, shared: SharedState) -> None:
        """Take in the vector of `lag` steps before, unless that was done."""
        if len(shared.posted) >= self.lag:
            self._receive(shared)

    def _receive(self, shared: SharedState) -> None:
        """Take in the oldest posted vector."""
        ticket, sightings, audit = shared.posted.pop(0)
        waited_s = self.consensus.wait_s
        reduced = self.consensus.wait(ticket)
        reduced, below = reduced[: len(shared.groups)], reduced[len(shared.groups) :]
        shared.token_counts = [slot for group in below for slot in group]
        if audit is not None:
            self._count_audit(ticket.header.generation, Moments.decode(below[0], audit.exponent))
        shared.waited_s += self.consensus.wait_s - waited_s
        broken = 0
        for group, numbers, sighting in zip(shared.groups, reduced, sightings, strict=True):
            if sighting is None:
                group.moments = None
                continue
            moments = Moments.decode(numbers, sighting.exponent)
            group.moments = (moments, sighting)
            group.exponent = moments.next_exponent(sighting.exponent)
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

    def _count_audit(self, generation: int, error: Moments) -> None:
        """Count an audited skip, harmful from the threshold on; an unknown error is harmful."""
        if error.tokens == 0:  # the span was not called
            return
        limit = self.config.cache_ratio_threshold**2 * error.reference
        small = error.change == 0 or error.change < limit
        known = not error.nonfinite and not error.overflow
        self.counters.record_audit(generation, not (small and known))

    def _decide(self, shared: SharedState, call: Call) -> None:
        """Turn reduced numbers into one flag per span, and keep the books."""
        judgements, shared.forced = self._judgements(shared, call)
        skip = [judged.skip for judged in judgements]
        warm_up = call.step < self.config.num_warmup_steps
        all_tokens = warm_up or call.is_last_step or shared.poisoned
        shared.step_plan = StepPlan(skip, shared.poisoned, all_tokens, self._moving(shared, call))
        self.counters.record(call.step, call.branch, skip)
        self.decisions.record(Decision(call, judgements, shared.waited_s))
        shared.waited_s = 0.0
        shared.sightings = [
            self._sighting(shared, index, call) for index in range(len(shared.groups))
        ]
        if self._learns:
            for index, span in enumerate(shared.spans):
                if span.anchor is not None:
                    evidence = self._evidence(shared, index, call, span.anchor)
                    span.gate_state = self.gate.learn(span.gate_state, evidence, skip[index])
        shared.audit = self._audited(shared, call, skip)
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

    def _audited(self, shared: SharedState, call: Call, skip: list[bool]) -> Audit | None:
        """Return which skip of a step is audited, a function of its place and the flags alone.

        After the last step no vector would bring the error home.
        """
        skipped = [span for span, flag in enumerate(skip) if flag]
        if not skipped or self.lag or call.is_last_step:
            return None
        place = f"{call.generation}/{call.step}".encode()
        draw = int.from_bytes(hashlib.sha256(place).digest()[:4], "big")
        if draw >= self.config.shadow_audit * 2**32:
            return None
        span = skipped[draw % len(skipped)]
        # Of the order of what entered it, which this gate measures.
        group = self.groups.index(next(g for g in self.groups if g.span == span))
        return Audit(span, shared.groups[group].exponent)

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
        """Return a judgement a span, and whether all ranks compute, come what may.

        A step that a mask computes is not of that kind: stages may be a step ahead in the mask.
        """
        forced = self._reason_to_compute(shared, call)
        if forced:
            return [Judgement(False, forced)] * len(shared.spans), forced != STEPS_MASK
        return [self._judge(shared, index, call) for index in range(len(shared.spans))], False

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

    def _judge(self, shared: SharedState, index: int, call: Call) -> Judgement:
        """Ask the gate about one span, where there is anything to ask."""
        anchor = shared.spans[index].anchor
        if index < self.decides_at:
            return Judgement(False, FIRST_BLOCK)
        if anchor is None:
            return Judgement(False, NO_ANCHOR)
        if self.config.steps_mask is not None:
            return Judgement(True, STEPS_MASK)
        # Steps that the branch was left out at make its anchor older as skipped ones do.
        limit = self.config.max_consecutive_skips
        if limit is not None and call.step - anchor.step > limit:
            return Judgement(False, TOO_OLD)
        evidence = self._evidence(shared, index, call, anchor)
        verdict = self.gate.weigh(evidence, shared.spans[index].gate_state)
        if verdict is None:
            return Judgement(False, NOT_MEASURED)
        reason = UNCHANGED if verdict.may_skip else CHANGED
        return Judgement(verdict.may_skip, reason, verdict.statistic, verdict.threshold)

    def _evidence(self, shared: SharedState, index: int, call: Call, anchor: Mark) -> Evidences:
        """Return what is known for the decision of one span, by probe."""
        levels = (call.noise_level, anchor.noise_level, shared.spans[index].older_level)

        def weighed(moments: Moments, gap: int) -> Evidence:
            return Evidence(
                change=moments.change,
                change_squared=moments.change_squared,
                reference=moments.reference,
                tokens=moments.tokens,
                dim=self.dim,
                lag=call.step - anchor.step,
                noise_levels=levels,
                gap=gap,
            )

        found: dict[Probe | None, Evidence] = {None: weighed(_NOTHING, 1)}
        for group in self._weighed[index]:
            found[self.groups[group].probe] = weighed(*self._brought(shared, group, call))
        return found

    def _brought(self, shared: SharedState, index: int, call: Call) -> tuple[Moments, int]:
        """Return a group's moments, brought to a step, and the gap that they were measured over."""
        found, group = shared.groups[index].moments, self.groups[index]
        if found is None or found[1].anchor_level is None:
            return _NOTHING, 1
        moments, sighting = found
        # What the middle block adds is known of computed steps alone, and tells their rate.
        reference = self._reference(shared, group)
        if group.probe is not Probe.MIDDLE_RESIDUAL and reference is not None:
            level, norm = reference.noise_level, group.probe.norm
            moments = rescaled(moments, sighting, call.noise_level, level, norm)
        return moments, sighting.gap

    def _sighting(self, shared: SharedState, index: int, call: Call) -> Sighting:
        """Return where a group is measured in this step."""
        exponent, reference = (
            shared.groups[index].exponent,
            self._reference(shared, self.groups[index]),
        )
        if reference is None:
            return Sighting(exponent, call.noise_level, None)
        gap = call.step - reference.step
        return Sighting(exponent, call.noise_level, reference.noise_level, gap)

    def _reference(self, shared: SharedState, group: MomentGroup) -> Mark | None:
        """Return the step that a group is measured against, as `Prober.renew` keeps it."""
        if group.span is not None:
            return shared.spans[group.span].anchor
        return shared.computed if group.probe is Probe.FIRST_RESIDUAL else shared.previous

    # ---- the end of a generation -------------------------------------------------------------

    def finish(self) -> None:
        """Complete a generation: nothing of it reaches into the next.

        After a failed wait there is nothing that could be completed; the next vector says so again.

        Raises:
            ConsensusError: with `verify_consensus`, ranks decided differently.
        """
        tickets = [posted.ticket for shared in self.branches.values() for posted in shared.posted]
        for shared in self.branches.values():
            shared.posted.clear()
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

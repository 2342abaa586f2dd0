"""A forward pass on its way through the blocks: each span is computed or stood in for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from xfuser_fastcache.blueprint import Blueprint
from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.consensus.collective import Consensus
from xfuser_fastcache.decisions.agreement import Agreement
from xfuser_fastcache.measurements.moments import Reference, measure
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import noise_tokens
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, LocalState, Memory
from xfuser_fastcache.state.prober import Prober
from xfuser_fastcache.state.shared import SharedState, StepPlan
from xfuser_fastcache.tokens.base import CannotForecast

logger = logging.getLogger("xfuser_fastcache")


class SpanVisit(NamedTuple):
    """A span that was entered and not yet left.

    Attributes:
        span: its index in the whole model.
        inputs: what entered it.
        memory: what is remembered of it.
        skips: whether something stands in for it.
        audits: whether it is computed all the same.
    """

    span: int
    inputs: Streams
    memory: Memory
    skips: bool
    audits: bool


class Passage:
    """Runs the blocks of one rank, or stands in for them, by the plan of each step.

    Args:
        plan: what the cache is built from.
        consensus: of the decision group.
        agreement: takes the moments, and gives the plan.
        prober: takes the moments of the blocks.

    Attributes:
        call: the forward pass under way; None between two.
        step_plan: what it is to do; that of the step before, until `decide` has been called.
        recomputes: whether it runs again, since a forecast has found no place in it.
    """

    def __init__(self, plan: Blueprint, consensus: Consensus, agreement: Agreement, prober: Prober):
        self.plan = plan
        self.consensus = consensus
        self.agreement = agreement
        self.prober = prober
        self.forecaster = plan.forecaster
        self.tokens = plan.tokens
        self.pieces = plan.pieces()
        # Multiply-adds of all blocks for a token.
        self._cost = sum(part.blocks * part.cost for stage in consensus.stages for part in stage)
        self.call: Call | None = None
        self.step_plan = StepPlan([])
        self.recomputes = False
        self._local: LocalState
        self._decide: Callable[[], None] | None = None
        self._visit: SpanVisit | None = None
        self._said_outside = False

    def begin(self, call: Call, local: LocalState, decide: Callable[[], None] | None) -> None:
        """Begin a forward pass.

        Args:
            call: where it is.
            local: what this rank remembers of its branch.
            decide: takes the consensus and sets `step_plan`; None where that is done.
        """
        self.call, self._local, self._decide = call, local, decide
        self.recomputes = False
        if call.starts_generation:
            self.forget()
        self.plan.keys.open(call.step, call.noise_level)

    def end(self) -> None:
        """End a forward pass.

        Raises:
            CannotForecast: see `_leave_unfinished`.
        """
        self.agreement.counters.carried_keys += self.plan.keys.close()
        if self.step_plan.distrust:
            self.plan.keys.forget()  # a slope may hold the NaN, and bring it up again
        self._leave_unfinished()
        self._take_decision()  # no block ran here; the other ranks wait all the same
        if self.plan.latents is not None:
            call, _ = self._here()
            self.plan.latents.listen(self._local, call.position)

    def recompute(self) -> None:
        """Let the forward pass run again, all of it: a forecast has found no place in it.

        Its decisions stand, and what was remembered of its branch is forgotten: the next steps have
        no anchors until one is computed.
        """
        self._visit, self.recomputes = None, True
        self._take_decision()
        assert self.call is not None
        self._local.forget(self.call.position)
        self.agreement.counters.record_recomputed()
        self._exceed()

    def _exceed(self) -> None:
        """Count what is computed all the same where a budget has it skipped."""
        call, _ = self._here()
        schedule = self.agreement.rules.schedule
        if schedule is not None and schedule.exceeded(call, computed=True):
            self.agreement.counters.forced_beyond_budget += 1

    def forget(self) -> None:
        """Forget what is remembered beside the branches' memories."""
        self.plan.keys.forget()
        if self.plan.latents is not None:
            self.plan.latents.forget()

    def nbytes(self) -> int:
        """Bytes of what is remembered beside the branches' memories."""
        held = self.tokens.nbytes() + self.forecaster.nbytes() + self.plan.keys.nbytes()
        return held if self.plan.latents is None else held + self.plan.latents.nbytes()

    def abandon(self) -> None:
        """Leave a forward pass that has failed."""
        self.plan.keys.close()
        self.forget()
        self.call = self._visit = self._decide = None

    def _take_decision(self) -> None:
        decide, self._decide = self._decide, None
        if decide is not None:
            decide()

    def run_block(
        self,
        index: int,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run one block, or stand in for it; the whole forward pass counts as block 0 where the
        forecaster stands in for that.

        A skipped span is forecast at its last block, so that whatever the model adds between
        blocks finds its place; the blocks before it hand their input on. Where it is audited, its
        blocks run. The model may leave blocks out (`skip_layers` of SD3): a span begins with the
        first of its blocks that is called.

        Args:
            index: of the block among those of this rank.
            forward: the block's own forward.
            args, kwargs: its arguments.

        Raises:
            CannotForecast: see `_leave_unfinished`.
        """
        if self.call is None:
            self._say_outside()
            return forward(*args, **kwargs)
        if self.recomputes:
            return forward(*args, **kwargs)
        piece, contract = self.pieces[index], self.plan.contracts[index]
        if self._visit is None or piece.span != self._visit.span:
            self._visit = self._enter(index, contract.read(args, kwargs), args, kwargs)
        visit, is_last = self._visit, index == piece.last
        if visit.skips and not visit.audits:
            if not is_last and isinstance(contract, BlockContract):
                return contract.handed_on(args, kwargs)
            return contract.pack(self._forecast(visit))
        counters = self.agreement.counters
        output = self.tokens.run_block(index, contract, forward, args, kwargs, counters)
        if visit.skips:
            if not is_last:
                return output
            return contract.pack(self._audited(visit, contract.unpack(output)))
        if index in self.prober.residuals:
            streams = contract.read(args, kwargs), contract.unpack(output)
            call, shared = self._here()
            self.prober.block_output(index, *streams, self._local, shared, call.position)
        outputs = self._leave(visit, contract.unpack(output)) if is_last else None
        return output if outputs is None else contract.pack(outputs)

    def _say_outside(self) -> None:
        if not self._said_outside:
            self._said_outside = True
            logger.warning(
                "A cached block runs outside of its transformer's hooked forward, uncached. If "
                "xfuser has wrapped the transformer since the cache was applied, call remove_cache "
                "on the old one and apply the cache to the pipeline's transformer again. (Said "
                "once.)"
            )

    def _here(self) -> tuple[Call, SharedState]:
        assert self.call is not None
        return self.call, self.agreement.branch(self.call.branch)

    def _enter(
        self, index: int, inputs: Streams, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> SpanVisit:
        """Measure what enters a span; at the first one that is decided, then decide."""
        self._leave_unfinished()
        (call, shared), local = self._here(), self._local
        span, rules = self.pieces[index].span, self.agreement.rules
        memory = local.memory(span, call.position)
        if self.plan.latents is not None:
            inputs = self.plan.latents.given(inputs, call.position)
        reference = memory.anchors[0].reference if memory.anchors else None
        # Where no tokens are counted, the gate does not let the span be skipped.
        if not memory.output_unknown:
            self.prober.span_input(span, inputs, reference, local, shared)
        self.prober.block_input(index, args, kwargs, local, shared, call.position)
        # The first span that has anchors.
        if span == rules.decides_at and reference is not None:
            self.tokens.measure(inputs.hidden_states, reference, self._count_slots())
        if span >= rules.decides_at:
            self._take_decision()
        skips = span >= rules.decides_at and self.step_plan.skip[span]
        if skips and not memory.anchors:
            # Who decides without measuring knows no better; every rank finds the same.
            skips = False
            self.agreement.counters.record_forecast(self.plan.share_of(span))
            if call.opens_step and span == rules.decides_at:
                self._exceed()
        audits = skips and shared.audit is not None and shared.audit.span == span
        # A pipeline stage reads from a receive buffer that the next patch overwrites, and a
        # callback may write into the latents; nobody writes into what a block was given.
        if not skips:
            self.tokens.enter(self.step_plan, memory)
            if rules.lag or self.forecaster.whole_forward:
                inputs = inputs.map(torch.clone)
        return SpanVisit(span, inputs, memory, skips, audits)

    def _count_slots(self) -> torch.Tensor:
        """Return the slots of this rank's own token counts."""
        edges, group = self.tokens.edges, self.consensus.group
        slots = self._local.pending[len(self.agreement.rules.groups) :].view(-1)
        return slots[group.ranks.index(group.rank) * edges :][:edges]

    def _leave_unfinished(self) -> None:
        """Leave a span whose last block was not called: what it put out is not known.

        Raises:
            CannotForecast: it was to be skipped, or some of its tokens, and what stands in for them
                has had no place.
        """
        visit, self._visit = self._visit, None
        if visit is None:
            return
        if visit.skips or self.tokens.splits:
            raise CannotForecast(f"the last block of span {visit.span} was not called")
        call, _ = self._here()
        self._local.remember(visit.span, call.position, Memory(output_unknown=True))

    def _forecast(self, visit: SpanVisit) -> Streams:
        """Stand in for a skipped span."""
        self._visit = None
        call, _ = self._here()
        now = visit.inputs, call.noise_level
        spent = self.forecaster.multiply_adds_per_token(visit.memory, *now)
        self.agreement.counters.record_forecast(spent / self._cost)
        return self.forecaster.forecast(visit.memory, *now)

    def _audited(self, visit: SpanVisit, truth: Streams) -> Streams:
        """Stand in for a skipped span that was computed as well, and measure the error."""
        _, shared = self._here()
        assert shared.audit is not None
        like = visit.inputs.hidden_states
        made = self._forecast(visit)
        if self.consensus.group.counts_tokens:
            true = Reference.of(noise_tokens(truth.hidden_states, like))
            found = noise_tokens(made.hidden_states, like)
            self._local.pending[-1].add_(measure(found, true, shared.audit.exponent))
        self.agreement.counters.record_forecast(self.plan.share_of(visit.span))
        return made

    def _leave(self, visit: SpanVisit, outputs: Streams) -> Streams | None:
        """Remember a computed span, unless it is one that is never skipped.

        Returns:
            Its output, where that is not what its last block put out.
        """
        self._visit = None
        if visit.span < self.agreement.rules.decides_at:
            return None
        call, _ = self._here()
        inputs, memory, splits = visit.inputs, visit.memory, self.tokens.splits
        if splits:
            outputs = self.tokens.leave(inputs, outputs, memory, call.noise_level)
            spent = self.tokens.static_multiply_adds(inputs)
            self.agreement.counters.record_forecast(spent / self._cost)
        refers = self.tokens.measures or visit.span in self.prober.inputs
        anchor = Anchor(
            noise_level=call.noise_level,
            inputs=inputs,
            residual=self.forecaster.kept(inputs, outputs),
            reference=Reference.of(inputs.hidden_states) if refers else None,
        )
        if splits:
            memory = self.tokens.remembered(memory, anchor, self.forecaster)
            self._local.remember(visit.span, call.position, memory)
            return outputs
        if self.step_plan.distrust or memory.output_unknown:
            # Its anchors may hold the NaN, which looking back would bring up again; a span whose
            # output is not known has none.
            memory = Memory()
        memory = self.forecaster.update(memory, anchor)
        self._local.remember(visit.span, call.position, memory)
        return self.forecaster.correct_computed(memory)

"""The engine: one per transformer; it alone moves between consensus, gate and forecaster.

Order of a step: the transformer's hook opens it, the consensus is taken, the gate's answers
become one flag a span, each span is computed or forecast while its moments are summed on the
device, the transformer's hook closes it. A computed span runs on the tokens of the token plan.

With one pipeline stage decisions are "current": the vector is posted and awaited where the first
block is entered, and holds the first span's moments of this step and the other spans' of the
step before. A gate that has to see what the first block puts out moves this behind that block,
which is then a span of its own and always computed. With several stages decisions are "lagged", so
that nobody waits: what a step measured decides the next but one, since by then every stage has
closed it. Where only the first stage measures (one span), the others have nothing to add and post
as they open a step: then it decides the next one.

A pipeline runs empty at each skipped step, if all stages skip the same step: the first one has no
work until the last one has finished the step before. With `stagger_stages` a decision travels with
the work: a stage acts on the next step's decision from the patch on at whose turn the first stage
has gone on to the next step. Each stage skips each patch as often, but not all at once, and the
pipeline stays full.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from xfuser_fastcache.artifacts.calibration import Fitted
from xfuser_fastcache.artifacts.linear_map import SpanMaps
from xfuser_fastcache.backends import forecaster_of, gate_of
from xfuser_fastcache.clock.ownership import Ownership
from xfuser_fastcache.clock.plan_check import refused_plan
from xfuser_fastcache.clock.timeline import Call, Schedule, Timeline
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.consensus.collective import Consensus, ConsensusError
from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.consensus.watchdog import Watchdog
from xfuser_fastcache.decisions.agreement import Agreement
from xfuser_fastcache.decisions.log import DecisionLog
from xfuser_fastcache.measurements.moments import SLOTS, Reference, measure
from xfuser_fastcache.measurements.probes import MomentGroup, groups_of
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import ForwardContract, noise_tokens
from xfuser_fastcache.models.spans import pieces_held
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.reports.statistics import BlockInfo, Counters
from xfuser_fastcache.state.local import (
    Anchor,
    LocalState,
    Memory,
)
from xfuser_fastcache.state.prober import Prober
from xfuser_fastcache.state.shared import (
    SharedState,
    StepPlan,
    count_groups,
)
from xfuser_fastcache.tokens.interface import NoTokenPlan, TokenPlan

logger = logging.getLogger("xfuser_fastcache")


def _lag(groups: list[MomentGroup], consensus: Consensus) -> int:
    """Return by how many steps decisions lag; see the module.

    Args:
        groups: of moments, each measured at a block.
        consensus: knows how many blocks each stage holds.
    """
    if consensus.group.stages == 1:
        return 0
    in_first_stage = sum(part.blocks for part in consensus.stages[0])
    return 1 if all(group.block < in_first_stage for group in groups) else 2


class CacheEngine:
    """Skips spans of one transformer's blocks, in step with every rank of the decision group.

    Args:
        config: resolved options.
        consensus: of the decision group.
        blocks: all blocks of the whole model, in order.
        contracts: contract of each block that this rank holds, in order; where the forecaster
            stands in for the whole forward pass, that of the forward pass alone.
        first_block: index in `blocks` of the first one that this rank holds.
        dim: width of a token that is measured, `hidden_states.shape[-1]`.
        fitted: what a calibration left for this model, or None.
        modulated: from the first block's arguments, its normed and modulated input; None where
            this rank does not hold that block.
        polynomial: for a gate that estimates the change of the output by one: what is published
            for the model, highest power first; None for nothing.
        tokens: which tokens computed spans run on; None for all of them. For one stage only.
        maps: fitted linear maps of the one span, where it is skipped; None for none. For one stage
            only.
    """

    def __init__(
        self,
        config: CacheConfig,
        consensus: Consensus,
        blocks: list[BlockInfo],
        contracts: Sequence[BlockContract | ForwardContract],
        first_block: int,
        dim: int,
        fitted: Fitted | None = None,
        modulated: Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor] | None = None,
        polynomial: tuple[float, ...] | None = None,
        tokens: TokenPlan | None = None,
        maps: SpanMaps | None = None,
    ):
        self.tokens = tokens or NoTokenPlan()
        assert (not self.tokens.measures and maps is None) or consensus.group.stages == 1
        self.config = config
        self.fitted = fitted
        self.consensus = consensus
        self.blocks = blocks
        self.contracts = contracts
        # Multiply-adds of all blocks for a token.
        self._cost = sum(part.blocks * part.cost for stage in consensus.stages for part in stage)
        self.forecaster = forecaster_of(config, fitted, consensus.group, maps)
        gate = gate_of(config, fitted, polynomial)
        spans = [block.span for block in blocks]
        groups = groups_of(gate.probes, spans)
        self.pieces = pieces_held(spans, first_block, len(contracts))
        counts = consensus.group.counts_tokens
        self.prober = Prober(groups, first_block, len(contracts), counts, modulated)
        lag = _lag(groups, consensus)
        motion = self.tokens.motion
        span_count = 1 + max(spans)
        self.agreement = Agreement(config, consensus, gate, span_count, groups, dim, lag, motion)
        self.timeline = Timeline(config.num_steps)
        self.branches: dict[int, LocalState] = {}
        self.call: Call | None = None
        self.ownership = Ownership(self.timeline)
        self.watchdog = Watchdog(config.sync_timeout_s, consensus)
        weakref.finalize(self, self.watchdog.close)
        self._owes_consensus = False
        self._step_plan = StepPlan([])
        # The span that was entered and not yet left, what entered it, its flag, and whether it is
        # computed although it is skipped.
        self._inside: int | None = None
        self._entered: Streams | None = None
        self._skipping = False
        self._auditing = False
        self._said: set[str] = set()

    @property
    def decisions(self) -> DecisionLog:
        """The log of decisions."""
        return self.agreement.decisions

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
        """Begin a forward pass of the transformer; see `Timeline.open` for the arguments.

        Raises:
            TransformerInUse: another thread's generation is the current one; see `Ownership`.
            ValueError: see `refused_plan`; it leaves no generation behind.
        """
        self.ownership.claim(noise_level, schedule)
        call = self.timeline.open(timestep, noise_level, signature, position, schedule, branch_name)
        refused = refused_plan(call, self.timeline, self.config.steps_mask, self.fitted)
        if refused is not None:
            self.timeline.restart()
            raise ValueError(refused)
        if call.starts_generation:
            self._note_bytes()
            self.agreement.begin_generation()
            self.branches.clear()
        if call.branch not in self.branches:
            ranks = self.consensus.group.world_size
            below = count_groups(ranks, self.tokens.edges) + bool(self.config.shadow_audit)
            shape = (len(self.prober.groups) + below, SLOTS)
            pending = torch.zeros(shape, dtype=torch.int64, device=device)
            self.branches[call.branch] = LocalState(pending)
        self.call = call
        self.tokens.open_step(call.starts_generation)
        self.ownership.note(call)
        self.watchdog.expect(call.place)
        if call.opens_step and self.agreement.lag:
            self.agreement.decide_lagged(call)
            if not self.prober.measures:
                self.agreement.post(call, self.branches[call.branch].pending)
        elif call.opens_step:
            self._owes_consensus = True
        if self.agreement.lag:
            ahead = self._follows_next_step(position)
            following = self.timeline.following(call) if ahead else None
            self._step_plan = self.agreement.step_plan(call, ahead, following)

    def _follows_next_step(self, position: Position) -> bool:
        """Say whether a decision for the next step holds here; see the module."""
        return (
            self.config.stagger_stages
            and self.agreement.lag == 1
            and position.patched
            and self.consensus.group.stage + position.patch >= len(position.patch_tokens)
        )

    def close(self) -> None:
        """End a forward pass.

        Raises:
            RuntimeError: see `_give_up_span`.
        """
        call, local, _ = self._current()
        self._give_up_span()
        agreement = self.agreement
        if self._owes_consensus:
            # No block ran here; the other ranks wait all the same.
            self._take_consensus(call, local)
        self.prober.renew(local, call.position, all_computed=not any(self._step_plan.skip))
        if agreement.lag and self.prober.measures and call.position.is_last_patch:
            agreement.post(call, local.pending)
        self.call = None
        if call.more_steps_follow:
            self.watchdog.expect(f"the communication after {call.place}")
        else:
            self.watchdog.rest()
        if call.is_last_step and call.position.is_last_patch:
            agreement.verify()
            if not agreement.lag:
                agreement.complete_verifications()

    def abandon(self, error: BaseException) -> None:
        """Leave a forward pass that raised `error`; the next one starts a new generation.

        Raises:
            ConsensusTimeout: from `error`, where it is a broken or timed-out communication.
        """
        place = "a forward pass" if self.call is None else self.call.place
        self.call = self._inside = None
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
        """
        if self.call is None:
            self._warn_once(
                "A cached block runs outside of its transformer's hooked forward, uncached. If "
                "xfuser has wrapped the transformer since the cache was applied, call remove_cache "
                "on the old one and apply the cache to the pipeline's transformer again."
            )
            return forward(*args, **kwargs)
        piece, contract = self.pieces[index], self.contracts[index]
        if piece.span != self._inside:
            self._enter(index, contract.read(args, kwargs), args, kwargs)
        if self._skipping and not self._auditing:
            if index < piece.last:
                return contract.pack(contract.read(args, kwargs))
            return contract.pack(self._forecast(piece.span))
        counters = self.agreement.counters
        output = self.tokens.run_block(index, contract, forward, args, kwargs, counters)
        if self._skipping:
            if index < piece.last:
                return output
            return contract.pack(self._audited(piece.span, contract.unpack(output)))
        if index in self.prober.residuals:
            call, local, shared = self._current()
            streams = contract.read(args, kwargs), contract.unpack(output)
            self.prober.block_output(index, *streams, local, shared, call.position)
        if index < piece.last:
            return output
        outputs = self._leave(piece.span, contract.unpack(output))
        return output if outputs is None else contract.pack(outputs)

    def attention_of(self, index: int, block: nn.Module) -> dict[str, nn.Module]:
        """Return the modules of a block that are to run through `run_attention`, by name."""
        contract = self.contracts[index]
        if not self.tokens.hooks_attention or not isinstance(contract, BlockContract):
            return {}
        return contract.attention_of(block)

    def run_attention(
        self,
        key: tuple[int, str],
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an attention module of a computed block, by the block's index and its own name."""
        if self.call is None:
            return forward(*args, **kwargs)
        return self.tokens.run_attention((self.call.branch, *key), forward, args, kwargs)

    def _enter(
        self, index: int, inputs: Streams, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Measure what enters a span; at the first one that is decided, then decide."""
        call, local, shared = self._current()
        self._give_up_span()
        span = self.pieces[index].span
        self._inside = span
        memory = local.memory(span, call.position)
        # Where no tokens are counted, the gate does not let the span be skipped.
        if not memory.output_unknown:
            reference = memory.anchors[0].reference if memory.anchors else None
            self.prober.span_input(span, inputs, reference, local, shared)
        self.prober.block_input(index, args, kwargs, local, shared, call.position)
        # The first span that has anchors.
        if span == self.agreement.decides_at and memory.anchors:
            reference = memory.anchors[0].reference
            self.tokens.measure(inputs.hidden_states, reference, self._count_slots(local))
        decided = span >= self.agreement.decides_at
        if self._owes_consensus and decided:
            self._take_consensus(call, local)
        self._skipping = decided and self._step_plan.skip[span]
        self._auditing = shared.audit is not None and shared.audit.span == span
        if self._skipping and memory.output_unknown:
            # A gate that measures the span's input finds no tokens, and does not come here.
            who, mend = "steps_mask", "leave out steps_mask"
            if self.config.steps_mask is None:
                who, mend = "the gate", "take use_cache='Fast', which computes such spans"
            raise RuntimeError(
                f"{who} skips span {span} at {call.place}, whose last block the model left out "
                "where it was computed, so that its output is not known. Call the transformer "
                f"without skip_layers, or {mend}."
            )
        # A pipeline stage reads from a receive buffer that the next patch overwrites, and a
        # callback may write into the latents; nobody writes into what a block was given.
        safe = self._skipping or not (self.agreement.lag or self.forecaster.whole_forward)
        self._entered = inputs if safe else inputs.map(torch.clone)
        if not self._skipping:
            self.tokens.enter(self._step_plan, memory)

    def _count_slots(self, local: LocalState) -> torch.Tensor:
        """Return the slots of this rank's own token counts."""
        edges, group = self.tokens.edges, self.consensus.group
        slots = local.pending[len(self.prober.groups) :].view(-1)
        return slots[group.ranks.index(group.rank) * edges :][:edges]

    def _give_up_span(self) -> None:
        """Forget a span whose last block was not called: what it put out is not known.

        Raises:
            RuntimeError: it was to be skipped, or some of its tokens, and what stands in for them
                had no place.
        """
        if self._inside is None:
            return
        call, local, _ = self._current()
        if self._skipping or self.tokens.splits:
            raise RuntimeError(
                f"the model left out the last block of span {self._inside} at {call.place}, where "
                "it had run at the last computed step of this branch. Call the transformer with "
                "the same skip_layers at all steps of a branch, or under another cache_context."
            )
        local.remember(self._inside, call.position, Memory(output_unknown=True))
        self._inside = None

    def _forecast(self, span: int) -> Streams:
        """Stand in for a skipped span."""
        self._inside = None
        call, local, _ = self._current()
        assert self._entered is not None
        memory = local.memory(span, call.position)
        asked = memory, self._entered, call.noise_level
        spent = self.forecaster.multiply_adds_per_token(*asked)
        self.agreement.counters.record_forecast(spent / self._cost)
        return self.forecaster.forecast(*asked)

    def _audited(self, span: int, truth: Streams) -> Streams:
        """Stand in for a skipped span that was computed as well, and measure the error."""
        call, local, shared = self._current()
        assert shared.audit is not None and self._entered is not None
        like = self._entered.hidden_states
        made = self._forecast(span)
        if self.consensus.group.counts_tokens:
            true = Reference.of(noise_tokens(truth.hidden_states, like))
            found = noise_tokens(made.hidden_states, like)
            local.pending[-1].add_(measure(found, true, shared.audit.exponent))
        spent = sum(block.cost for block in self.blocks if block.span == span)
        self.agreement.counters.record_forecast(spent)
        return made

    def _leave(self, span: int, outputs: Streams) -> Streams | None:
        """Remember a computed span, unless it is one that is never skipped.

        Returns:
            Its output, where that is not what its last block put out.
        """
        self._inside = None
        if span < self.agreement.decides_at:
            return None
        call, local, _ = self._current()
        assert self._entered is not None
        memory = local.memory(span, call.position)
        splits = self.tokens.splits
        if splits:
            outputs = self.tokens.leave(self._entered, outputs, memory, call.noise_level)
            spent = self.tokens.static_multiply_adds(self._entered)
            self.agreement.counters.record_forecast(spent / self._cost)
        anchor = Anchor(
            noise_level=call.noise_level,
            inputs=self._entered,
            residual=self.forecaster.kept(self._entered, outputs),
            reference=(
                Reference.of(self._entered.hidden_states)
                if self.tokens.measures or span in self.prober.inputs
                else None
            ),
        )
        if splits:
            memory = self.tokens.remembered(memory, anchor, self.forecaster)
            local.remember(span, call.position, memory)
            return outputs
        if self._step_plan.distrust or memory.output_unknown:
            # Its anchors may hold the NaN, which looking back would bring up again; a span that was
            # given up has none.
            memory = Memory()
        memory = self.forecaster.update(memory, anchor)
        local.remember(span, call.position, memory)
        return self.forecaster.correct_computed(memory)

    def _take_consensus(self, call: Call, local: LocalState) -> None:
        self._owes_consensus = False
        self.agreement.decide_now(call, local.pending)
        self._step_plan = self.agreement.step_plan(call)

    def _current(self) -> tuple[Call, LocalState, SharedState]:
        assert self.call is not None
        branch = self.call.branch
        return self.call, self.branches[branch], self.agreement.branch(branch)

    def _warn_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s (Said once.)", message)

    # ---- called by apply --------------------------------------------------------------------

    def shut_down(self) -> None:
        """End for good; with `verify_consensus` all ranks meet here."""
        self.agreement.finish()
        self.agreement.complete_verifications()
        self.branches.clear()
        self.watchdog.close()
        self.consensus.close()

    def _note_bytes(self) -> None:
        """Anchors only come to be within a generation, so its end has the most."""
        held = sum(local.nbytes() for local in self.branches.values())
        held += self.tokens.nbytes() + self.forecaster.nbytes()
        self.agreement.counters.saw_bytes(held)

    def statistics(self) -> dict[str, Any]:
        """Return the counters; waits for nothing, so that a single rank may ask."""
        self._note_bytes()
        return {
            "use_cache": self.config.use_cache,
            **self.agreement.counters.as_dict(self.blocks),
            "decisions_digest": self.decisions.hexdigest(),
        }

    def trace(self) -> list[dict[str, Any]]:
        """Return the last generation's decisions, one entry a step, branch and span, in order."""
        return self.decisions.trace(self.blocks)

    def reset_statistics(self) -> None:
        """Start the counters anew; decisions and anchors stay."""
        self.agreement.counters = Counters(self.consensus, self.decisions.spans)

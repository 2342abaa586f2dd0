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

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from xfuser_fastcache.blueprint import Blueprint
from xfuser_fastcache.clock.clock import Clock
from xfuser_fastcache.clock.sources import Arrival
from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.consensus.collective import Consensus
from xfuser_fastcache.consensus.inputs import SharedInputs
from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.consensus.watchdog import Watchdog
from xfuser_fastcache.coverage import Coverage
from xfuser_fastcache.decisions.agreement import Agreement
from xfuser_fastcache.decisions.log import DecisionLog
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.measurements.moments import SLOTS
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.passage import Passage
from xfuser_fastcache.reports.statistics import Counters
from xfuser_fastcache.state.local import LocalState
from xfuser_fastcache.state.shared import count_groups


class CacheEngine:
    """Skips spans of one transformer's blocks, in step with every rank of the decision group.

    Args:
        plan: what it is built from.
        consensus: of the decision group.
        clock: of the pipeline.
    """

    def __init__(self, plan: Blueprint, consensus: Consensus, clock: Clock):
        assert not plan.tokens.edges or consensus.group.stages == 1
        self.plan = plan
        self.config = plan.config
        self.consensus = consensus
        self.inputs = SharedInputs(consensus, plan.config.verify_consensus)
        self.clock = clock
        self.denoiser = clock.admit(self)
        rules = plan.rules(consensus)
        self._coverage = Coverage(plan, rules)
        self.agreement = Agreement(rules, consensus, plan.tokens.motion)
        self.prober = plan.prober(rules, consensus.group.counts_tokens)
        self.passage = Passage(plan, consensus, self.agreement, self.prober)
        self.branches: dict[int, LocalState] = {}
        self.watchdog = Watchdog(plan.config.sync_timeout_s, consensus)
        weakref.finalize(self, self.watchdog.close)
        self._generation = -1

    @property
    def call(self) -> Call | None:
        """The forward pass under way, or None."""
        return self.passage.call

    @property
    def forecaster(self) -> Forecaster:
        """What stands in for skipped spans; another may be put in its place between two steps."""
        return self.passage.forecaster

    @forecaster.setter
    def forecaster(self, forecaster: Forecaster) -> None:
        self.passage.forecaster = forecaster

    @property
    def decisions(self) -> DecisionLog:
        """The log of decisions."""
        return self.agreement.decisions

    # ---- called by the transformer's hook ---------------------------------------------------

    def open(self, arrival: Arrival) -> None:
        """Begin a forward pass of the transformer.

        Raises:
            TransformerInUse: another thread's generation is the current one; see `Ownership`.
            ValueError: see `Schedule.refuses`; it leaves no generation behind.
        """
        call = self.clock.open(arrival)
        if call.starts_generation:
            self._begin_plan(call)
        begins = call.generation != self._generation
        is_new = begins or call.branch not in self.branches
        self.inputs.check_call(call.place, call.setup, arrival.inputs if is_new else None)
        if begins:
            self._generation = call.generation
            self._note_bytes()
            self.agreement.begin_generation(call)
            self.branches.clear()
        if call.branch not in self.branches:
            self.branches[call.branch] = self._new_branch(arrival.latents.device)
        local, agreement = self.branches[call.branch], self.agreement
        self.plan.tokens.open_step(begins)
        self.watchdog.expect(call.place)
        if not agreement.rules.lag:
            agreement.open_foregone(call)
            self.passage.begin(call, local, self._decide if call.opens_step else None)
            return
        self.passage.begin(call, local, None)
        if call.opens_step:
            agreement.decide_lagged(call)
            if not self.prober.measures:
                agreement.post(call, local.pending)
        ahead = self._follows_next_step(call.position)
        following = self.clock.timeline.following(call) if ahead else None
        self.passage.step_plan = agreement.step_plan(call, ahead, following)

    def _begin_plan(self, call: Call) -> None:
        """Go by the calibration where it covers a generation.

        A schedule refuses what it cannot hold for here, and never later: what it does not cover
        then is computed.

        Raises:
            ValueError: see `Schedule.refuses`; it leaves no generation behind.
        """
        timeline = self.clock.timeline
        changed = self._coverage.changed(call, timeline)
        if changed is not None:
            self.forecaster, self.agreement.rules = changed
        schedule = self.agreement.rules.schedule
        refused = schedule and schedule.refuses(timeline.planned_steps, call.steps)
        if refused:
            timeline.restart()
            raise ValueError(refused)

    def _decide(self) -> None:
        """Take the consensus of the step that is open, and act on it."""
        call = self.passage.call
        assert call is not None
        self.agreement.decide_now(call, self.branches[call.branch].pending)
        self.passage.step_plan = self.agreement.step_plan(call)

    def _new_branch(self, device: torch.device) -> LocalState:
        below = count_groups(self.consensus.group.world_size, self.plan.tokens.edges)
        below += bool(self.config.shadow_audit)
        shape = (len(self.agreement.rules.groups) + below, SLOTS)
        return LocalState(torch.zeros(shape, dtype=torch.int64, device=device))

    def _follows_next_step(self, position: Position) -> bool:
        """Say whether a decision for the next step holds here; see the module."""
        return (
            self.config.stagger_stages
            and self.agreement.rules.lag == 1
            and position.patched
            and self.consensus.group.stage + position.patch >= len(position.patch_tokens)
        )

    def close(self) -> None:
        """End a forward pass.

        Raises:
            CannotForecast: run it again after `recompute`.
        """
        call, agreement = self.passage.call, self.agreement
        assert call is not None
        self.passage.end()
        local, lag = self.branches[call.branch], agreement.rules.lag
        computed = not any(self.passage.step_plan.skip)
        self.prober.renew(local, call.position, all_computed=computed)
        if lag and self.prober.measures and call.position.is_last_patch:
            agreement.post(call, local.pending)
        self.passage.call = None
        if call.more_steps_follow:
            self.watchdog.expect(f"the communication after {call.place}")
        else:
            self.watchdog.rest()
        if call.is_last_step and call.position.is_last_patch:
            agreement.few_steps.end(call, agreement.decisions)
            agreement.verify()
            if not lag:
                agreement.complete_verifications()

    def recompute(self) -> None:
        """Let the forward pass run again, uncached; see `Passage.recompute`."""
        self.passage.recompute()

    def abandon(self, error: BaseException) -> None:
        """Leave a generation that `error` has ended, and let the other ranks know.

        Raises:
            ConsensusTimeout: from `error`, where it is a broken or timed-out communication.
        """
        self.passage.abandon()
        self.agreement.leave()
        self.clock.timeline.restart()
        self.watchdog.rest()
        self.consensus.fail(error, self.inputs.place)

    # ---- called by the clock ----------------------------------------------------------------

    def rest(self) -> None:
        """Expect no call for now: another denoiser works."""
        self.watchdog.rest()

    def retire(self) -> None:
        """Free what is remembered: another denoiser has taken over for the rest."""
        self._note_bytes()
        for local in self.branches.values():
            local.memories.clear()
            local.references.clear()
        self.passage.forget()

    # ---- called by the block hooks ----------------------------------------------------------

    def run_block(
        self,
        index: int,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a block, or stand in for it; see `Passage.run_block`."""
        return self.passage.run_block(index, forward, args, kwargs)

    def attention_of(self, index: int, block: nn.Module) -> dict[str, nn.Module]:
        """Return the modules of a block that are to run through `run_attention`, by name."""
        contract = self.plan.contracts[index]
        if not self.plan.tokens.hooks_attention or not isinstance(contract, BlockContract):
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
        call = self.passage.call
        if call is None or self.passage.recomputes:
            return forward(*args, **kwargs)
        return self.plan.tokens.run_attention((call.branch, *key), forward, args, kwargs)

    # ---- called by apply --------------------------------------------------------------------

    def shut_down(self) -> None:
        """End for good, whatever is raised; with `verify_consensus` all ranks meet here."""
        try:
            self.agreement.finish()
            self.agreement.complete_verifications()
        finally:
            self.retire()  # else reference cycles keep the anchors
            self.branches.clear()
            self.watchdog.close()
            self.consensus.close()

    def _note_bytes(self) -> None:
        """Anchors only come to be within a generation, so its end has the most."""
        held = sum(local.nbytes() for local in self.branches.values())
        self.agreement.counters.saw_bytes(held + self.passage.nbytes())

    def statistics(self) -> dict[str, Any]:
        """Return the counters; waits for nothing, so that a single rank may ask."""
        self._note_bytes()
        source = self.clock.timeline.source
        return {
            "use_cache": self.config.use_cache,
            **self.agreement.counters.as_dict(self.plan.blocks, self.consensus.usage),
            "decisions_digest": self.decisions.hexdigest(),
            "clock": None if source is None else source.name,
        }

    def trace(self) -> list[dict[str, Any]]:
        """Return the last generation's decisions, one entry a step, branch and span, in order."""
        return self.decisions.trace(self.plan.blocks)

    def reset_statistics(self) -> None:
        """Start the counters anew; decisions and anchors stay."""
        self.agreement.counters = Counters(self.consensus.usage, self.decisions.spans)

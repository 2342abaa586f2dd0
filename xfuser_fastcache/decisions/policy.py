"""The policy: from reduced numbers and shared state to a flag a span, with its reason.

Functions of their arguments and of nothing else: no tensor, no clock, no random number, and no
attribute that they change. So ranks that know the same decide the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from xfuser_fastcache.clock.schedule import Schedule
from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.decisions.log import (
    CHANGED,
    FIRST_BLOCK,
    LAST_STEP,
    NO_ANCHOR,
    NOT_MEASURED,
    OFF,
    SYNCHRONOUS,
    TOO_OLD,
    UNCHANGED,
    WARM_UP,
    Judgement,
)
from xfuser_fastcache.gates.base import Evidence, Evidences, Rule
from xfuser_fastcache.measurements.moments import NOTHING, Moments
from xfuser_fastcache.measurements.probes import MomentGroup, Probe
from xfuser_fastcache.state.shared import Mark, SharedState, Sighting, reference_of, rescaled


@dataclass(frozen=True)
class Rules:
    """What decisions of one transformer go by, the same for all its generations.

    Attributes:
        config: resolved options.
        gate: of the backend.
        spans: number of spans of the whole model.
        groups: of moments in the vector, as the gate's probes ask for them.
        dim: width of a token.
        lag: a decision rests on the vector of so many steps before; 0 for the step's own.
        history: anchors that the forecaster looks back on.
        schedule: the steps that are computed by plan; None where the gate decides.
    """

    config: CacheConfig
    gate: Rule
    spans: int
    groups: tuple[MomentGroup, ...]
    dim: int
    lag: int = 0
    history: int = 1
    schedule: Schedule | None = None

    @cached_property
    def decides_at(self) -> int:
        """First span that is decided: 1 where the gate has to see the first block's output."""
        return int(Probe.FIRST_RESIDUAL in self.gate.probes)

    @cached_property
    def current(self) -> list[int]:
        """Groups that are measured before a step is decided, where nothing lags."""
        return [
            index
            for index, group in enumerate(self.groups)
            if (group.span or 0) <= self.decides_at and group.probe is not Probe.MIDDLE_RESIDUAL
        ]

    @cached_property
    def unasked(self) -> bool:
        """Whether no decision rests on what is measured."""
        return self.schedule is not None or not self.config.enable_block_approx

    @cached_property
    def foregone(self) -> bool:
        """Whether what is measured is read a step later, since no decision rests on it."""
        return self.unasked and not self.lag and not self.config.shadow_audit

    def weighed(self, span: int) -> list[int]:
        """Return the groups that the decision of a span rests on."""
        return [
            index
            for index, group in enumerate(self.groups)
            if group.probe is not Probe.SPAN_INPUT or group.span == span
        ]

    def warms_up(self, call: Call) -> bool:
        """Say whether a step is among the first ones, which are always computed.

        A denoiser that enters a generation later takes as many as its forecaster looks back on.
        """
        first = self.config.num_warmup_steps
        if call.entered:
            first = min(first, self.history)
        return call.step - call.entered < first


def judge(rules: Rules, shared: SharedState, call: Call) -> tuple[list[Judgement], bool]:
    """Return a judgement a span, and whether all ranks compute, come what may.

    A step that a schedule computes is not of that kind: stages may be a step ahead in it.
    """
    forced = _reason_to_compute(rules, shared, call)
    if forced:
        stays = forced != (rules.schedule and rules.schedule.reason)
        return [Judgement(False, forced)] * rules.spans, stays
    return [_judge_span(rules, shared, index, call) for index in range(rules.spans)], False


def _reason_to_compute(rules: Rules, shared: SharedState, call: Call) -> str | None:
    """Return why all spans are computed at this step, or None."""
    if not rules.config.enable_block_approx:
        return OFF
    schedule = rules.schedule
    if schedule is not None:
        computes = schedule.computes(call)
        if computes is not False:
            return schedule.reason if computes else schedule.beyond
    elif rules.warms_up(call):
        return WARM_UP
    elif call.is_last_step:
        return LAST_STEP
    if shared.poisoned:
        return shared.poisoned
    if schedule is not None and schedule.budget is not None:
        return None
    return SYNCHRONOUS if rules.lag and not call.position.patched else None


def _judge_span(rules: Rules, shared: SharedState, index: int, call: Call) -> Judgement:
    """Ask the gate about one span, where there is anything to ask."""
    anchor = shared.spans[index].anchor
    if index < rules.decides_at:
        return Judgement(False, FIRST_BLOCK)
    if anchor is None:
        return Judgement(False, NO_ANCHOR)
    if rules.schedule is not None:
        return Judgement(True, rules.schedule.reason)
    # Steps that the branch was left out at make its anchor older as skipped ones do.
    limit = rules.config.max_consecutive_skips
    if limit is not None and call.step - anchor.step > limit:
        return Judgement(False, TOO_OLD)
    found = evidence(rules, shared, index, call, anchor)
    verdict = rules.gate.weigh(found, shared.spans[index].gate_state)
    if verdict is None:
        return Judgement(False, NOT_MEASURED)
    reason = UNCHANGED if verdict.may_skip else CHANGED
    return Judgement(verdict.may_skip, reason, verdict.statistic, verdict.threshold)


def evidence(rules: Rules, shared: SharedState, index: int, call: Call, anchor: Mark) -> Evidences:
    """Return what is known for the decision of one span, by probe."""
    levels = (call.noise_level, anchor.noise_level, shared.spans[index].older_level)

    def weighed(moments: Moments, gap: int) -> Evidence:
        return Evidence(
            change=moments.change,
            change_squared=moments.change_squared,
            reference=moments.reference,
            tokens=moments.tokens,
            dim=rules.dim,
            lag=call.step - anchor.step,
            noise_levels=levels,
            gap=gap,
            elapsed=call.elapsed,
        )

    found: dict[Probe | None, Evidence] = {None: weighed(NOTHING, 1)}
    for group in rules.weighed(index):
        found[rules.groups[group].probe] = weighed(*_brought(rules, shared, group, call))
    return found


def _brought(rules: Rules, shared: SharedState, index: int, call: Call) -> tuple[Moments, int]:
    """Return a group's moments, brought to a step, and the gap that they were measured over."""
    found, group = shared.groups[index].moments, rules.groups[index]
    if found is None or found[1].anchor_level is None:
        return NOTHING, 1
    moments, seen = found
    # What the middle block adds is known of computed steps alone, and tells their rate.
    reference = reference_of(shared, group)
    if group.probe is not Probe.MIDDLE_RESIDUAL and reference is not None:
        level, norm = reference.noise_level, group.probe.norm
        moments = rescaled(moments, seen, call.noise_level, level, norm)
    return moments, seen.gap


def sighting(rules: Rules, shared: SharedState, index: int, call: Call) -> Sighting:
    """Return where a group is measured in this step."""
    exponent = shared.groups[index].exponent
    reference = reference_of(shared, rules.groups[index])
    if reference is None:
        return Sighting(exponent, call.noise_level, None)
    return Sighting(exponent, call.noise_level, reference.noise_level, call.step - reference.step)

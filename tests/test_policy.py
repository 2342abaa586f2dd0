"""The policy: a pure function from reduced numbers and shared state to a flag a span, and why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from support.stack import config_of

from xfuser_fastcache.backends import gate_of
from xfuser_fastcache.clock.schedule import Schedule
from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.decisions.policy import Rules, evidence, judge, sighting
from xfuser_fastcache.gates.base import Evidence, Verdict
from xfuser_fastcache.measurements.moments import Moments
from xfuser_fastcache.measurements.probes import Probe, groups_of
from xfuser_fastcache.state.shared import (
    GroupState,
    Mark,
    SharedState,
    Sighting,
    SpanState,
    rescaled,
)

STEPS = 10
MASK = [1] + [0] * (STEPS - 1)
QUIET = Moments(0.0, 0.0, 100.0, tokens=6, nonfinite=0, overflow=0)
LOUD = Moments(400.0, 30000.0, 100.0, tokens=6, nonfinite=0, overflow=0)


def rules_of(spans: int = 1, lag: int = 0, history: int = 1, **options: Any) -> Rules:
    """Return rules for as many blocks as spans."""
    config = config_of(**{"num_warmup_steps": 2, "max_consecutive_skips": 3, **options})
    gate = gate_of(config)
    groups = tuple(groups_of(gate.probes, list(range(spans))))
    return Rules(config, gate, spans, groups, 4, lag, history, Schedule.of(config))


def level_of(step: int) -> float:
    return 1 - step / STEPS


def call_at(step: int, planned: int | None = None, **given: Any) -> Call:
    """Return a forward pass of ten."""
    return Call(
        **{
            "generation": 0,
            "step": step,
            "planned_step": step if planned is None else planned,
            "branch": 0,
            "opens_step": True,
            "noise_level": level_of(step),
            "is_last_step": step == STEPS - 1,
            "more_steps_follow": step < STEPS - 1,
            "position": Position(),
            "starts_generation": step == 0,
            **given,
        }
    )


def shared_at(rules: Rules, anchor: int | None, step: int, *moments: Moments | None) -> SharedState:
    """Return what all ranks know at a step.

    Args:
        rules: of the transformer.
        anchor: step at which all spans were last computed; None for none.
        step: that is decided.
        *moments: of each group, measured at that step.
    """
    mark = None if anchor is None else Mark(level_of(anchor), anchor)
    shared = SharedState(
        [SpanState(mark, gate_state=rules.gate.init()) for _ in range(rules.spans)],
        [GroupState() for _ in rules.groups],
        previous=Mark(level_of(step - 1), step - 1),
        computed=mark,
    )
    for index, (group, found) in enumerate(zip(shared.groups, moments, strict=True)):
        seen = sighting(rules, shared, index, call_at(step))
        group.moments = None if found is None else (found, seen)
    return shared


def judged(
    rules: Rules, *moments: Moments | None, step: int = 4, anchor: int | None = 3, **given: Any
) -> tuple[list[tuple[bool, str]], bool]:
    """Return flags and reasons at a step, and whether all ranks compute whatever comes."""
    shared = shared_at(rules, anchor, step, *moments)
    call = call_at(step, **given)
    before = copy.deepcopy((shared, call))
    found, forced = judge(rules, shared, call)
    assert (shared, call) == before and judge(rules, shared, call) == (found, forced)
    return [(judgement.skip, judgement.reason) for judgement in found], forced


def test_each_span_is_weighed_by_its_own_numbers() -> None:
    rules = rules_of(spans=3)
    found, forced = judged(rules, QUIET, LOUD, None)
    assert found == [(True, "unchanged"), (False, "changed"), (False, "not measured")]
    assert not forced


def test_what_the_gate_weighed_stands_beside_its_flag() -> None:
    rules = rules_of(cache_ratio_threshold=0.3)
    (judgement,), _ = judge(rules, shared_at(rules, 3, 4, LOUD), call_at(4))
    assert judgement.statistic is not None and judgement.threshold is not None
    assert judgement.statistic > judgement.threshold > 0
    assert judgement.outcome == "computed"
    forced, _ = judge(rules, shared_at(rules, 3, 4, LOUD), call_at(STEPS - 1))
    assert (forced[0].outcome, forced[0].statistic) == ("forced", None)


@pytest.mark.parametrize(
    ("options", "where", "reason"),
    [
        ({"enable_block_approx": False}, {}, "off"),
        ({}, {"step": 0}, "warm-up"),
        ({}, {"step": 1}, "warm-up"),
        ({"num_warmup_steps": 5}, {}, "warm-up"),
        ({}, {"step": STEPS - 1}, "last step"),
        ({"steps_mask": [1, 0, 0, 0, 1]}, {}, "steps mask"),
        ({"steps_mask": [1, 0, 1]}, {"planned": 2}, "steps mask"),
        ({"steps_mask": [1, 0, 0, 0]}, {}, "beyond the steps mask"),
        ({"steps_mask": [1, *[0] * 8]}, {"planned": 9}, "beyond the steps mask"),
        ({"lag": 1}, {}, "synchronous step of the pipeline"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.replace(" ", "-"),
)
def test_some_steps_are_computed_whatever_the_gate_would_say(
    options: dict[str, Any], where: dict[str, Any], reason: str
) -> None:
    found, forced = judged(rules_of(spans=2, **options), QUIET, QUIET, **where)
    assert found == [(False, reason)] * 2
    # Stages may be a step ahead of a mask, and of nothing else.
    assert forced == (reason != "steps mask")


def test_a_mask_takes_the_place_of_warm_up_last_step_longest_run_and_gate() -> None:
    rules = rules_of(steps_mask=MASK, num_warmup_steps=5, max_consecutive_skips=1)
    for step in (1, 4, STEPS - 1):
        assert judged(rules, LOUD, step=step, anchor=0) == ([(True, "steps mask")], False)
    # But there has to be something to forecast from.
    assert judged(rules, LOUD, anchor=None) == ([(False, "no anchor")], False)


@pytest.mark.parametrize("why", ["not finite", "too large to be measured"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_poisoned_vector_makes_all_compute(masked: bool, why: str) -> None:
    rules = rules_of(steps_mask=MASK if masked else None)
    shared = shared_at(rules, 3, 4, QUIET)
    shared.poisoned = why
    found, forced = judge(rules, shared, call_at(4))
    assert ([j.reason for j in found], forced) == ([why], True)


def test_an_anchor_is_too_old_after_so_many_steps_whoever_saw_them() -> None:
    rules = rules_of()
    assert judged(rules, QUIET, step=6, anchor=3)[0] == [(True, "unchanged")]
    assert judged(rules, QUIET, step=7, anchor=3)[0] == [(False, "anchor too old")]
    assert judged(rules_of(max_consecutive_skips=None), QUIET, step=7, anchor=3)[0][0][0]


def test_patched_steps_of_a_pipeline_are_decided() -> None:
    position = Position(0, (3, 3), patched=True)
    assert judged(rules_of(lag=1), QUIET, position=position) == ([(True, "unchanged")], False)


@pytest.mark.parametrize(("history", "warm"), [(1, 1), (2, 2), (3, 2)])
def test_a_denoiser_that_enters_late_warms_up_as_its_forecaster_looks_back(
    history: int, warm: int
) -> None:
    """Two at most here, as the first one does; its steps count from where it entered."""
    rules = rules_of(history=history)
    reasons = [
        judged(rules, QUIET, step=step, anchor=5, entered=5)[0][0][1] for step in (5, 6, 7, 8)
    ]
    assert reasons == ["warm-up"] * warm + ["unchanged"] * (4 - warm)


def test_a_first_block_that_the_gate_has_to_see_is_always_computed() -> None:
    rules = rules_of(spans=3, use_cache="Fb", cache_ratio_threshold=0.1)
    assert rules.decides_at == 1 and rules.current == [0]
    still = Moments(0.0, 0.0, 100.0, tokens=6, nonfinite=0, overflow=0)
    found, _ = judged(rules, still)
    assert found == [(False, "the gate's first block"), *[(True, "unchanged")] * 2]


def test_where_nothing_lags_only_the_first_span_is_measured_at_the_step_itself() -> None:
    rules = rules_of(spans=3)
    assert (rules.decides_at, rules.current) == (0, [0])
    assert [rules.weighed(span) for span in range(3)] == [[0], [1], [2]]


# ---- evidence -----------------------------------------------------------------------------------


class Spy:
    """A gate that keeps what it was asked, and lets everything by."""

    probes = (Probe.SPAN_INPUT,)

    def __init__(self) -> None:
        self.asked: list[Evidence] = []

    def init(self) -> None:
        return None

    def weigh(self, found: Any, state: Any) -> Verdict:
        self.asked.append(found[Probe.SPAN_INPUT])
        return Verdict(0.0, 1.0)


def test_a_gate_is_told_the_change_the_age_and_three_noise_levels() -> None:
    gate = Spy()
    config = config_of(num_warmup_steps=0, max_consecutive_skips=3)
    groups = tuple(groups_of(gate.probes, [0]))
    rules = Rules(config, gate, 1, groups, dim=4)  # type: ignore[arg-type]
    shared = shared_at(rules, 3, 5, LOUD)
    shared.spans[0].older_level = level_of(1)
    judge(rules, shared, call_at(5))
    (asked,) = gate.asked
    assert (asked.change, asked.reference, asked.tokens, asked.dim) == (400.0, 100.0, 6, 4)
    assert (asked.lag, asked.gap) == (2, 2)
    assert asked.noise_levels == (level_of(5), level_of(3), level_of(1))


def test_an_older_measurement_is_brought_to_the_step_and_its_anchor() -> None:
    """Measured over one step, used over three: nine times the squared change."""
    rules = rules_of()
    shared = shared_at(rules, 3, 6, None)
    shared.groups[0].moments = (LOUD, Sighting(0, level_of(3), level_of(2), 1))
    anchor = shared.spans[0].anchor
    assert anchor is not None
    found = evidence(rules, shared, 0, call_at(6), anchor)[Probe.SPAN_INPUT]
    assert found.change == pytest.approx(9 * LOUD.change)
    assert found.change_squared == pytest.approx(81 * LOUD.change_squared)
    assert (found.reference, found.gap) == (LOUD.reference, 1)


@pytest.mark.parametrize(
    ("then", "now", "ratio"),
    [((0.8, 0.9), (0.6, 0.9), 9.0), ((0.8, 0.9), (0.7, 0.8), 1.0), ((0.9, 0.9), (0.6, 0.9), 1.0)],
)
@pytest.mark.parametrize("norm", [1, 2])
def test_a_change_grows_with_the_gap_in_noise(
    then: tuple[float, float], now: tuple[float, float], ratio: float, norm: int
) -> None:
    old = Moments(2.0, 3.0, 100.0, tokens=6, nonfinite=0, overflow=0)
    ratio = ratio ** (norm / 2)
    new = rescaled(old, Sighting(0, *then), *now, norm)
    assert (new.change, new.change_squared) == pytest.approx((2.0 * ratio, 3.0 * ratio**2))
    assert (new.reference, new.tokens) == (100.0, 6)


def test_a_sighting_names_the_anchor_that_a_group_is_measured_against() -> None:
    rules = rules_of()
    shared = shared_at(rules, 3, 5, None)
    shared.groups[0].exponent = 7
    assert sighting(rules, shared, 0, call_at(5)) == Sighting(7, level_of(5), level_of(3), 2)
    shared.spans[0].anchor = None
    assert sighting(rules, shared, 0, call_at(5)) == Sighting(7, level_of(5), None)
    # What follows the steps of the whole stack is measured against the step before.
    tea = rules_of(use_cache="Tea", cache_ratio_threshold=0.1)
    assert sighting(tea, shared_at(tea, 2, 5, None), 0, call_at(5)).anchor_level == level_of(4)
    # What the first block puts out, against the last step at which nothing was skipped.
    first = rules_of(use_cache="Fb", cache_ratio_threshold=0.1)
    assert sighting(first, shared_at(first, 2, 5, None), 0, call_at(5)).anchor_level == level_of(2)

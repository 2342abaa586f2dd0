"""Audits of skips while the cache serves: what they count, and that they change nothing else.

The true errors to compare with come from the recorder of the calibration, which computes skipped
steps by itself, and from arithmetic blocks, whose errors are known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.flux import STEPS
from support.stack import Stack, ones
from support.worlds import run_world
from test_recorder import Model, every_family

from xfuser_fastcache import CacheConfig, get_cache_statistics, remove_cache
from xfuser_fastcache.backends import FORECASTERS
from xfuser_fastcache.consensus.collective import Usage
from xfuser_fastcache.reports.false_skips import false_skip_interval, false_skip_rate
from xfuser_fastcache.reports.statistics import AUDITED, Counters

MASK = [1, 1, 1, 0, 1, 0, 0, 1]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def audit_of(statistics: dict[str, Any]) -> tuple[int, float | None]:
    return statistics["audits"], statistics["false_skip_rate"]


CASES = [
    *(("flux", name, "stack") for name in FORECASTERS),
    *(("flux", name, 2) for name in ("reuse", "linear_taylor")),
    *(
        (family, *case)
        for family in ("sd3", "pixart")
        for case in (("output", "stack"), ("taylor", 2))
    ),
]


@pytest.mark.parametrize(("family", "forecaster", "granularity"), CASES)
def test_audits_leave_the_pictures_and_the_decisions_alone(
    family: str, forecaster: str, granularity: Any
) -> None:
    found = {}
    for share in (0.0, 1.0):
        model = Model(family).cache(
            forecaster=forecaster, granularity=granularity, steps_mask=MASK, shadow_audit=share
        )
        latents = model()
        found[share] = latents, get_cache_statistics(model.transformer)
        remove_cache(model.transformer)
    (plain, before), (audited, after) = found.values()
    assert torch.equal(plain, audited)
    assert audit_of(before) == (0, None)
    assert after["audits"] == MASK.count(0)  # one span a step
    same = ("decisions_digest", "block_approx_ratio", "collectives", "nonfinite_steps", "blocks")
    assert [before[name] for name in same] == [after[name] for name in same]
    # What is computed as well is not saved: half of it where one of two spans is audited.
    saved = 0.0 if granularity == "stack" else before["estimated_flops_saved_ratio"] / 2
    assert after["estimated_flops_saved_ratio"] == pytest.approx(saved, rel=0.2, abs=1e-9)


@every_family
def test_harmful_are_the_skips_whose_true_error_reaches_the_threshold(family: str) -> None:
    """Of the whole forward pass, against the recorder; thresholds on both sides of each error."""
    (record, *_) = Model(family).cache(steps_mask=MASK).record()
    errors = np.sort(record.errors[record.skipped])
    assert len(errors) == 3 and (np.diff(errors) > 1e-3 * errors[1:]).all()
    for limit in (*(errors * 0.999), *(errors * 1.001)):
        model = Model(family).cache(
            steps_mask=MASK, shadow_audit=1.0, cache_ratio_threshold=float(limit)
        )
        model()
        wanted = 3, pytest.approx((errors >= limit).mean())
        assert audit_of(get_cache_statistics(model.transformer)) == wanted
        remove_cache(model.transformer)


@pytest.mark.parametrize(("now", "harmful"), [(2.9, 0), (3.1, 1)])
def test_the_error_of_a_span_is_that_of_what_leaves_it(now: float, harmful: int) -> None:
    """Blocks add 2, later more; a skip adds 2 again, so the error is (now - 2) / (1 + now)."""
    threshold = 1.0 / 4.0  # at now = 3
    mask = {"steps_mask": [1, 0, 1], "shadow_audit": 1.0}
    stack = Stack(blocks=2, cache_ratio_threshold=threshold, **mask)
    stack.added = [0.5, 1.5]
    stack(ones(), 1.0)
    stack.added = [0.5, now - 0.5]
    assert torch.equal(stack(ones(), 0.9), ones(3.0))
    assert stack.ran == [0, 1]
    assert audit_of(stack.engine.statistics()) == (0, None)  # with the next vector
    stack(ones(), 0.8)
    assert audit_of(stack.engine.statistics()) == (1, float(harmful))


def test_an_error_that_is_no_number_is_harmful() -> None:
    stack = Stack(blocks=1, steps_mask=[1, 0, 1], shadow_audit=1.0)
    stack(ones(), 1.0)
    stack.added = [float("nan")]
    assert torch.equal(stack(ones(), 0.9), ones())
    stack(ones(), 0.8)
    found = stack.engine.statistics()
    assert audit_of(found) == (1, 1.0)
    assert found["nonfinite_steps"] == 0  # nothing that decides was touched


def test_a_skip_that_is_right_is_harmless_at_any_threshold() -> None:
    stack = Stack(blocks=1, steps_mask=[1, 0, 1], shadow_audit=1.0, cache_ratio_threshold=1e-6)
    for level in (1.0, 0.9, 0.8):
        stack(torch.zeros(1, 6, 4), level)
    assert audit_of(stack.engine.statistics()) == (1, 0.0)


def draw(generation: int, step: int) -> int:
    """32 bits that say whether a step is audited."""
    return int(hashlib.sha256(f"{generation}/{step}".encode()).hexdigest()[:8], 16)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_which_steps_are_audited_follows_from_their_place(share: float) -> None:
    """The same on every rank, since only generation and step count; and about the share."""
    steps, generations = 12, 30
    # After the last step no vector would bring the error home.
    mask = [1] + [0] * (steps - 1)
    stack = Stack(blocks=2, steps_mask=mask, shadow_audit=share, num_steps=steps)
    ran = []
    for generation in range(generations):
        for step in range(steps):
            stack(ones(), 1.0 - step / steps)
            if step and stack.ran:
                ran.append((generation, step))
    places = [(g, s) for g in range(generations) for s in range(1, steps - 1)]
    drawn = [place for place in places if draw(*place) < share * 2**32]
    assert ran == drawn
    assert len(drawn) / len(places) == pytest.approx(share, abs=0.08)
    assert stack.engine.statistics()["audits"] == len(drawn)


def test_rate_and_interval_are_those_over_generations_that_had_audits() -> None:
    counters = Counters(Usage(0, 0.0), 1)
    for generation, flags in {0: [1, 0], 3: [0, 0, 0], 4: [1]}.items():
        for flag in flags:
            counters.record_audit(generation, bool(flag))
    harmful, audited = [1, 0, 1], [2, 3, 1]
    table = counters.audits()
    assert table["audits"] == 6
    assert table["false_skip_rate"] == false_skip_rate(harmful, audited)
    assert table["false_skip_interval"] == false_skip_interval(harmful, audited)


def test_audits_of_old_generations_are_forgotten() -> None:
    counters = Counters(Usage(0, 0.0), 1)
    for generation in range(AUDITED + 5):
        counters.record_audit(generation, generation < 5)
    assert counters.audits()["audits"] == AUDITED
    assert counters.audits()["false_skip_rate"] == 0.0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shadow_audit": 1.1}, ValueError, "shadow_audit=1.1 is not allowed; give 0 <= number <="),
        ({"shadow_audit": "all"}, TypeError, "shadow_audit='all' is not allowed"),
        ({"use_cache": "Tea"}, ValueError, "'Tea' bounds no error; leave one of them out"),
        ({"gate": "Fb"}, ValueError, "gate='Fb' bounds no error"),
        ({"gate": "Fast"}, ValueError, "gate='Fast' bounds no error"),
        ({"motion_threshold": 0.1}, ValueError, "does not go with token_plan='motion_static'"),
        ({"merge_ratio": 0.5}, ValueError, "does not go with token_plan='merging': it needs all t"),
    ],
)
def test_what_audits_do_not_go_with_is_refused(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        CacheConfig(**{"shadow_audit": 0.5, **options})


@pytest.mark.gloo
def test_two_ranks_audit_the_same_steps_and_find_what_one_rank_finds() -> None:
    world = run_world("audit_worker.py", 2, "2", "1")
    alone = run_world("audit_worker.py", 1, "1", "1")[0]["statistics"]
    assert alone["audits"] > 3 and 0 < alone["false_skip_rate"] < 1
    for report in world.values():
        assert report["same"] and not report["said"]
        assert audit_of(report["statistics"]) == audit_of(alone)


@pytest.mark.slow
@pytest.mark.gloo
def test_a_pipeline_says_that_it_does_not_audit() -> None:
    world = run_world("audit_worker.py", 2, "1", "2")
    for report in world.values():
        assert report["same"] and audit_of(report["statistics"]) == (0, None)
        (line,) = report["said"]
        assert "does nothing under PipeFusion" in line


assert STEPS == len(MASK)

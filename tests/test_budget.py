"""A budget: how many steps it computes, which ones, and what adds to them.

On arithmetic blocks and on a tiny FLUX; `tests/test_matrix.py` counts in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from support.flux import GUIDED, STEPS, Flux, nan_after_step, tiny_vae
from support.stack import Stack, ones

from xfuser_fastcache import CacheConfig, get_cache_statistics, get_cache_trace
from xfuser_fastcache.clock.schedule import Schedule, spread
from xfuser_fastcache.config.budget import QUALITIES
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.tokens.base import CannotForecast


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def skipped(*computed: int, steps: int = STEPS) -> list[int]:
    return [int(step not in computed) for step in range(steps)]


@pytest.mark.parametrize("computed", [1, 2, 5, STEPS, STEPS + 1])
@pytest.mark.parametrize("forecaster", ["reuse", "damped_taylor", "output"])
def test_a_budget_computes_so_many_steps(computed: int, forecaster: str) -> None:
    flux = Flux()
    wanted = flux()
    found = flux.cache(computed_steps=computed, forecaster=forecaster)()
    assert flux.flags.count(0) == min(computed, STEPS)
    assert [bool(flag) for flag in flux.flags] == [
        not computed for computed in spread(STEPS, min(computed, STEPS))
    ]
    assert torch.equal(found, wanted) == (computed >= STEPS)
    assert torch.equal(flux(), found)
    statistics = get_cache_statistics(flux.transformer)
    assert statistics["forced_beyond_budget"] == 0
    assert {row["reason"] for row in get_cache_trace(flux.transformer)} == {"budget"}


@pytest.mark.parametrize(
    ("option", "value", "computed"),
    [
        ("speedup", 1, 28),
        ("speedup", 2.5, 11),
        ("speedup", 28, 1),
        ("speedup", 1e6, 1),
        ("quality", "slow", 18),
        ("quality", "medium", 15),
        ("quality", "fast", 11),
        ("quality", "ultra", 8),
    ],
)
def test_a_budget_may_be_said_in_other_words(option: str, value: Any, computed: int) -> None:
    schedule = Schedule.of(CacheConfig(**{option: value}).resolved())
    assert schedule is not None and sum(schedule.flags(28) or ()) == computed
    # A picture of one step has that one.
    assert schedule.flags(1) == (1,)


def test_words_mean_less_and_less() -> None:
    assert list(QUALITIES.values()) == sorted(QUALITIES.values(), reverse=True)


def test_each_branch_of_guidance_computes_them() -> None:
    flux = Flux().cache(computed_steps=4)
    flux(**GUIDED)
    rows = get_cache_trace(flux.transformer)
    for branch in (0, 1):
        own = [row["decision"] == "skipped" for row in rows if row["branch"] == branch]
        assert own == [not computed for computed in spread(STEPS, 4)]


# ---- where nothing says which steps -------------------------------------------------------------


@pytest.mark.parametrize(("steps", "computed"), [(1, 1), (9, 9), (10, 5), (28, 15), (50, 27)])
def test_fast_alone_computes_about_half_of_the_steps_and_all_of_few(
    steps: int, computed: int
) -> None:
    schedule = Schedule.of(CacheConfig().resolved())
    assert schedule is not None and schedule.flags(steps) == spread(steps, computed)


def test_fast_alone_is_a_budget_on_a_pipeline() -> None:
    flux = Flux().cache(cache_ratio_threshold=None)
    wanted = flux(num_inference_steps=10)
    assert flux.flags == [1 - c for c in spread(10, 5)]
    assert {row["reason"] for row in get_cache_trace(flux.transformer)} == {"budget"}
    again = Flux().cache(quality="medium")
    assert torch.equal(again(num_inference_steps=10), wanted)


@pytest.mark.parametrize(
    "given",
    [
        {"cache_ratio_threshold": 0.1}, {"significance_level": 0.1}, {"test": "paper"},
        {"gate": "Tea"}, {"use_cache": "Tea"}, {"num_warmup_steps": 4},
        {"max_consecutive_skips": 2}, {"granularity": "block"}, {"shadow_audit": 0.1},
        {"enable_block_approx": False}, {"gate": {"all_of": ["Fast", "Tea"]}},
    ],
    ids=str,
)  # fmt: skip
def test_who_asks_for_a_gate_is_given_it(given: dict[str, Any]) -> None:
    found = CacheConfig(**given).resolved()
    assert Schedule.of(found) is None and found.quality is None


@pytest.mark.parametrize(
    "given",
    [{}, {"forecaster": "taylor"}, {"enable_token_merge": True}, {"num_steps": 28}],
    ids=str,
)
def test_what_says_nothing_of_steps_leaves_the_budget(given: dict[str, Any]) -> None:
    assert CacheConfig(**given).resolved().quality == "auto"


# ---- what it lifts, and what holds beside it ----------------------------------------------------


def test_a_budget_lifts_warm_up_and_the_limit_of_skips_that_were_not_given() -> None:
    flux = Flux().cache(computed_steps=2)
    flux()
    assert flux.flags == skipped(0, STEPS - 3)


def test_a_warm_up_that_is_given_is_part_of_the_budget() -> None:
    flux = Flux().cache(computed_steps=5, num_warmup_steps=3)
    flux()
    assert flux.flags == skipped(0, 1, 2, 4, 7)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"computed_steps": 2, "num_warmup_steps": 3},
            "computed_steps=2 computes 2 of 8 steps, fewer than num_warmup_steps=3; give a larger",
        ),
        (
            {"speedup": 4, "max_consecutive_skips": 3},
            "speedup=4.0 computes 2 of 8 steps and skips up to 4 in a row, more than "
            "max_consecutive_skips=3; give a larger budget, or leave max_consecutive_skips out",
        ),
    ],
    ids=["warm-up", "limit"],
)
def test_a_limit_that_is_given_and_cannot_hold_is_refused_as_a_generation_begins(
    given: dict[str, Any], words: str
) -> None:
    flux = Flux().cache(**given)
    with pytest.raises(ValueError, match=words):
        flux()
    assert flux(num_inference_steps=1).isfinite().all()


def test_a_limit_that_can_hold_is_kept() -> None:
    flux = Flux().cache(computed_steps=3, max_consecutive_skips=3)
    flux()
    assert flux.flags == skipped(0, 3, 6)


@pytest.mark.parametrize(
    "gate",
    [
        {"cache_ratio_threshold": 0},
        {"use_cache": "Fb", "cache_ratio_threshold": 0},
        {"gate": {"name": "Fast", "cache_ratio_threshold": 0}, "cache_ratio_threshold": None},
    ],
    ids=["Fast", "Fb", "gate"],
)
def test_a_threshold_of_0_wins_over_any_budget(gate: dict[str, Any]) -> None:
    flux = Flux()
    wanted = flux()
    assert torch.equal(flux.cache(speedup=4, **gate)(), wanted)
    assert flux.flags == [0] * STEPS


def test_no_block_approximation_wins_over_a_budget() -> None:
    flux = Flux().cache(computed_steps=2, enable_block_approx=False)
    flux()
    assert flux.flags == [0] * STEPS


@pytest.mark.parametrize("other", [{"speedup": 2}, {"quality": "fast"}, {"steps_mask": [1, 0]}])
def test_who_says_which_steps_are_computed_says_so_alone(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="says so too; leave one of them out, or give one of "):
        CacheConfig(computed_steps=3, **other)


def test_a_budget_goes_with_spans_and_gates_and_forecasters() -> None:
    """None of them has to say so: only who plans steps too is refused."""
    flux = Flux().cache(
        computed_steps=3,
        granularity=3,
        cache_ratio_threshold=None,
        gate={"any_of": ["Tea", "Ada"]},
        enable_adacorrection=True,
    )
    flux()
    assert flux.flags == [7 * flag for flag in skipped(0, 3, 6)]


def test_the_first_block_that_a_gate_looks_at_is_none_of_the_budget() -> None:
    flux = Flux().cache(use_cache="Fb", computed_steps=3)
    flux()
    assert [flag > 0 for flag in flux.flags] == [bool(flag) for flag in skipped(0, 3, 6)]
    assert get_cache_statistics(flux.transformer)["forced_beyond_budget"] == 0


# ---- what a budget has to know ------------------------------------------------------------------


def test_without_a_known_number_of_steps_a_budget_is_refused_with_the_mend() -> None:
    stack = Stack(computed_steps=2)
    with pytest.raises(ValueError, match="not known; pass scheduler=.*, or give num_steps"):
        stack(ones(), 1.0)
    assert stack.ran == stack.flags == []


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"quality": "auto"}, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]),
        ({"quality": "slow"}, [0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0]),
        ({"speedup": 2.5}, [0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0]),
        ({"speedup": 2, "num_warmup_steps": 3}, [0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0]),
    ],
    ids=str,
)
def test_without_a_known_number_of_steps_a_share_of_them_is_computed(
    given: dict[str, Any], flags: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    stack = Stack(**given)
    for step in range(11):
        stack(ones(), 1.0 - step / 20)
    assert stack.flags == flags
    said = [r.message for r in caplog.records if "without an end" in r.message]
    assert len(said) == 1 and "pass scheduler=..., or give num_steps" in said[0]


def test_a_limit_holds_without_a_known_number_of_steps() -> None:
    stack = Stack(speedup=4, max_consecutive_skips=2)
    words = "speedup=4.0 without a known end skips up to 3 in a row, more than"
    with pytest.raises(ValueError, match=words):
        stack(ones(), 1.0)
    stack = Stack(speedup=3, max_consecutive_skips=2)
    for step in range(7):
        stack(ones(), 1.0 - step / 20)
    assert stack.flags == [0, 1, 1, 0, 1, 1, 0]


def test_num_steps_stands_in_for_a_scheduler() -> None:
    stack = Stack(computed_steps=3, num_steps=5)
    for level in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        stack(ones(), level)
    # The sixth step is none that it knows of.
    assert stack.flags == [0, 1, 0, 1, 0, 0]
    assert stack.reasons == ["budget"] * 5 + ["beyond the budget"]
    assert stack.engine.statistics()["forced_beyond_budget"] == 1


def test_a_budget_follows_the_number_of_steps_of_each_generation() -> None:
    flux = Flux().cache(speedup=2)
    for steps, computed in ((STEPS, 4), (5, 2), (STEPS, 4)):
        flux(num_inference_steps=steps)
        assert flux.flags == [1 - c for c in spread(steps, computed)]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_an_img2img_pipeline_spends_it_on_the_steps_that_it_takes(strength: float) -> None:
    flux = Flux()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxImg2ImgPipeline(
        scheduler=flux.pipe.scheduler, transformer=flux.transformer, vae=tiny_vae(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    flux.cache(computed_steps=3)
    picture = torch.zeros(1, 3, 128, 128)
    pipe(**flux.call | {"num_inference_steps": STEPS, "strength": strength, "image": picture})
    assert flux.flags == [1 - c for c in spread(int(STEPS * strength), 3)]


# ---- what adds to it ----------------------------------------------------------------------------


def test_a_nan_adds_the_step_at_which_it_is_known() -> None:
    flux = Flux().cache(computed_steps=2)
    found = flux(callback_on_step_end=nan_after_step(1, mended=True))
    assert flux.flags == [0, 1, 1, 0, 1, 0, 1, 1]
    assert found.isfinite().all()
    assert get_cache_statistics(flux.transformer)["forced_beyond_budget"] == 1


def test_a_branch_that_comes_late_adds_its_first_step() -> None:
    stack = Stack(computed_steps=2, num_steps=4)
    for level in (1.0, 0.9, 0.8, 0.7):
        for name in ("a", "b") if level < 1.0 else ("a",):
            stack(ones(), level, name=name)
    flags = {branch: [f for _, b, f in stack.places if b == branch] for branch in (0, 1)}
    assert flags == {0: [0, 1, 0, 1], 1: [0, 0, 1]}
    assert stack.engine.statistics()["forced_beyond_budget"] == 1


def test_another_size_within_a_picture_is_computed() -> None:
    stack = Stack(computed_steps=2, num_steps=4)
    for level, batch in ((1.0, 1), (0.9, 2), (0.8, 2), (0.7, 2)):
        stack(ones().expand(batch, -1, -1), level)
    assert stack.flags == [0, 0, 0, 1]
    assert stack.engine.statistics()["forced_beyond_budget"] == 1


def test_a_forward_pass_that_runs_again_is_counted_and_the_next_has_no_anchor() -> None:
    stack = Stack(computed_steps=2, num_steps=5, granularity=2)
    stack(ones(), 1.0)
    with pytest.raises(CannotForecast):
        stack(ones(), 0.9, left_out=3)
    stack.engine.recompute()
    for index in (0, 1, 2):
        stack.run(index, ones())
    stack.engine.close()
    for level, ran in ((0.8, 4), (0.7, 4), (0.6, 0)):
        stack(ones(), level)
        assert len(stack.ran) == ran
    assert stack.flags == [0, 3, 3, 0, 3]
    assert stack.engine.statistics()["forced_beyond_budget"] == 2


def test_synchronous_steps_of_a_pipeline_add_nothing() -> None:
    stack = Stack(group=DecisionGroup(stages=2), computed_steps=2, num_steps=6)
    made = []
    stack.added = [1.0] * 4
    for step in range(6):
        made.append(stack.pipelined(ones(float(step)), 1 - step / 10, patched=step > 2))
    assert stack.flags == [0, 1, 1, 1, 0, 1]
    assert [x.unique().tolist() for x in made] == [[step + 4.0] for step in range(6)]
    assert stack.engine.statistics()["forced_beyond_budget"] == 0

"""A mask of steps: what it computes, what it overrides, and which generations it refuses.

On arithmetic blocks and on a tiny FLUX, with every kind of forecaster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from support.flux import STEPS, Flux, nan_after_step, tiny_vae
from support.loops import LEVELS, SCHEDULER, Branch, begin, cached, denoise, flags_of, same
from support.stack import EVER, Stack, config_of, ones, plan_of

from xfuser_fastcache import get_cache_statistics, get_cache_trace
from xfuser_fastcache.backends import gate_of
from xfuser_fastcache.gates.base import Evidence
from xfuser_fastcache.gates.chi_square import ChiSquareGate

MASK = [1, 0, 0, 0, 0, 0, 1, 0]
every_forecaster = pytest.mark.parametrize(
    "forecaster", ["reuse", "linear", "taylor", "linear_taylor", "output"]
)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@every_forecaster
@pytest.mark.parametrize("threshold", [0, 1e-9, 1e6])
def test_a_mask_wins_over_gate_warm_up_last_step_and_longest_run(
    forecaster: str, threshold: float
) -> None:
    flux = Flux().cache(
        forecaster=forecaster,
        steps_mask=MASK,
        cache_ratio_threshold=threshold,
        num_warmup_steps=3,
        max_consecutive_skips=1,
    )
    first = flux()
    assert flux.flags == [1 - computed for computed in MASK]
    assert torch.equal(flux(), first)
    trace = get_cache_trace(flux.transformer)
    assert [row["reason"] for row in trace] == ["steps mask"] * STEPS
    assert [row["decision"] for row in trace] == [
        "scheduled" if computed else "skipped" for computed in MASK
    ]
    assert all(row["statistic"] is row["threshold"] is None for row in trace)


@pytest.mark.parametrize("granularity", ["stack", 3, "block"])
def test_every_span_goes_by_the_mask(granularity: Any) -> None:
    flux = Flux().cache(granularity=granularity, steps_mask=MASK)
    flux()
    spans = {"stack": 1, "block": 6}.get(granularity, granularity)
    assert flux.flags == [0 if computed else 2**spans - 1 for computed in MASK]


def test_a_mask_of_ones_is_bit_identical_to_no_cache() -> None:
    flux = Flux()
    wanted = flux()
    assert torch.equal(flux.cache(steps_mask=[1] * STEPS)(), wanted)


def test_no_block_approximation_wins_over_a_mask() -> None:
    flux = Flux().cache(steps_mask=MASK, enable_block_approx=False)
    flux()
    assert flux.flags == [0] * STEPS


# ---- generations that a mask is not for ---------------------------------------------------------


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1, 1])
@pytest.mark.parametrize("forecaster", ["taylor", "output"])
def test_a_mask_of_another_length_than_the_schedulers_plan_is_refused(
    steps: int, forecaster: str
) -> None:
    flux = Flux().cache(steps_mask=MASK, forecaster=forecaster)
    wanted = flux()
    words = f"steps_mask has {STEPS} entries, but this generation has {steps} steps; give one"
    with pytest.raises(ValueError, match=words):
        flux(num_inference_steps=steps)
    assert get_cache_statistics(flux.transformer)["steps"] == STEPS
    assert torch.equal(flux(), wanted)


def test_a_mask_of_another_length_than_num_steps_is_refused() -> None:
    stack = Stack(steps_mask=[1, 0, 1], num_steps=4)
    with pytest.raises(ValueError, match="steps_mask has 3 entries, .* has 4 steps; give one"):
        stack(ones(), 1.0)
    assert stack.ran == stack.flags == []


@pytest.mark.parametrize("options", [{"num_steps": 3}, {}], ids=["num_steps", "steps unknown"])
def test_a_generation_that_goes_on_after_its_mask_computes_the_rest(
    options: dict[str, Any],
) -> None:
    """Nothing that only the cache knows ends a picture."""
    stack = Stack(steps_mask=[1, 0, 1], **options)
    for level in (1.0, 0.9, 0.8, 0.7, 0.6):
        stack(ones(), level)
    assert stack.flags == [0, 1, 0, 0, 0]
    assert stack.reasons == ["steps mask"] * 3 + ["beyond the steps mask"] * 2
    stack(ones(), 1.0), stack(ones(), 0.5)
    assert stack.flags == [0, 1]


def test_a_plan_that_is_made_anew_within_a_picture_begins_a_generation() -> None:
    """Of other steps it is refused, as at the first call; the next one is as if it had not been."""
    transformer, branch = cached(steps_mask=MASK), Branch(0)
    wanted = denoise(transformer, branch)[0]
    begin(branch)
    branch.step(transformer, LEVELS[0], named=False)
    SCHEDULER.set_timesteps(sigmas=LEVELS[:-1])
    with pytest.raises(ValueError, match="steps_mask has 8 entries, .* has 7 steps; give one"):
        branch.step(transformer, LEVELS[0], named=False)
    assert same(denoise(transformer, branch)[0], wanted)
    assert list(flags_of(transformer).values()) == [1 - computed for computed in MASK]


def test_the_schedulers_plan_counts_and_not_num_steps() -> None:
    flux = Flux().cache(steps_mask=MASK, num_steps=3)
    flux()
    assert flux.flags == [1 - computed for computed in MASK]


# ---- where a mask has to give way ---------------------------------------------------------------


@every_forecaster
def test_a_nan_is_computed_through(forecaster: str) -> None:
    flux = Flux().cache(steps_mask=MASK, forecaster=forecaster)
    healthy = flux()
    found = flux(callback_on_step_end=nan_after_step(1, mended=True))
    # Step 2 sees the NaN; a mask learns of it a step later.
    assert flux.flags == [0, 1, 1, 0, 1, 1, 0, 1]
    reasons = [row["reason"] for row in get_cache_trace(flux.transformer)]
    assert reasons == ["steps mask"] * 3 + ["not finite"] + ["steps mask"] * 4
    assert found.isfinite().all()
    assert torch.equal(flux(), healthy)


def test_after_a_nan_neither_gate_nor_forecaster_knows_an_anchor_before_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two anchors are another cell of a calibration than one, and a line in place of a level."""
    options = {"num_warmup_steps": 2, "max_consecutive_skips": 2, "cache_ratio_threshold": EVER}
    asked, gate = {}, gate_of(config_of(**options))
    judge = type(gate).judge

    def spied(self: ChiSquareGate, found: Evidence, state: Any = None) -> Any:
        asked[len(stack.flags)] = found.noise_levels
        return judge(self, found, state)

    monkeypatch.setattr(ChiSquareGate, "judge", spied)
    stack = Stack(rule=gate, forecaster="taylor", **options)
    levels, made = [1 - step / 8 for step in range(9)], []
    for step, level in enumerate(levels):
        stack.added = [float(step), 0.0, 0.0, 0.0]
        made.append(stack(ones(torch.nan if step == 4 else 1.0), level)[0, 0, 0].item())
    assert stack.flags == [0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert {step: asked[step][1:] for step in (2, 3, 6, 7)} == {
        **dict.fromkeys((2, 3), (levels[1], levels[0])),
        **dict.fromkeys((6, 7), (levels[5], None)),
    }
    # What is added grows by one a step: in a line from the first two, and then as the last was.
    assert [made[step] for step in (2, 3, 6, 7)] == [3.0, 4.0, 6.0, 6.0]


def test_a_branch_that_first_comes_at_a_skipped_step_is_computed() -> None:
    stack = Stack(steps_mask=[1, 0, 0], num_steps=3)
    for level in (1.0, 0.9, 0.8):
        for name in ("a", "b") if level < 1.0 else ("a",):
            stack(ones(), level, name=name)
    assert stack.places == [(0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 1), (2, 1, 1)]


# ---- a pipeline that enters the plan in the middle ----------------------------------------------


def test_a_generation_that_begins_in_the_middle_goes_by_its_place_in_the_plan() -> None:
    stack = Stack(steps_mask=[1, 1, 0, 0, 1, 0])
    plan = plan_of(1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    for step in plan.steps[2:]:
        stack(ones(), step.timestep, plan=plan)
    calls = [decision.call for decision in stack.engine.decisions.decisions]
    assert [(call.step, call.planned_step) for call in calls] == [(0, 2), (1, 3), (2, 4), (3, 5)]
    # The first step is to be skipped, but there is no anchor yet.
    assert (stack.flags, stack.reasons[0]) == ([0, 1, 0, 1], "no anchor")


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_an_img2img_pipeline_goes_by_the_mask_of_its_whole_plan(strength: float) -> None:
    flux = Flux()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxImg2ImgPipeline(
        scheduler=flux.pipe.scheduler, transformer=flux.transformer, vae=tiny_vae(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    mask = [1, 0, 1, 0, 0, 1, 0, 0]
    flux.cache(steps_mask=mask)
    picture = torch.zeros(1, 3, 128, 128)
    pipe(**flux.call | {"num_inference_steps": STEPS, "strength": strength, "image": picture})
    begins = STEPS - int(STEPS * strength)
    wanted = [1 - computed for computed in mask[begins:]]
    assert flux.flags == [0, *wanted[1:]]
    assert wanted[0] == (strength < 1)

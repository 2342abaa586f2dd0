"""A mask of steps: what it computes, what it overrides, and which generations it refuses.

On arithmetic blocks and on the tiny FLUX of `test_engine.py`, with every kind of forecaster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxImg2ImgPipeline
from test_engine import STEPS, TWO_STAGES, Flux, Stack, left_out, nan_after_step, ones
from test_engine import pipelined_step as pipelined

from xfuser_fastcache import get_cache_statistics, get_cache_trace
from xfuser_fastcache.clock.timeline import Schedule
from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.models.adapter import Step

MASK = [1, 0, 0, 0, 0, 0, 1, 0]
every_forecaster = pytest.mark.parametrize(
    "forecaster", ["reuse", "linear", "taylor", "linear_taylor", "output"]
)
from xfuser_fastcache.gates.chi_square import ChiSquareGate


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
        "forced" if computed else "skipped" for computed in MASK
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
def test_a_generation_that_goes_on_after_its_mask_is_refused(options: dict[str, Any]) -> None:
    stack = Stack(steps_mask=[1, 0, 1], **options)
    for level in (1.0, 0.9, 0.8):
        stack(ones(), level)
    assert stack.flags == [0, 1, 0]
    with pytest.raises(ValueError, match="steps_mask has 3 entries, .* goes on after 3 steps"):
        stack(ones(), 0.7)
    # What comes next is a generation of its own, though the noise falls on.
    stack(ones(), 0.6), stack(ones(), 0.5)
    assert stack.flags == [0, 1]


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
    # Step 2 sees the NaN and step 3 is measured against it.
    assert flux.flags == [0, 1, 0, 0, 1, 1, 0, 1]
    reasons = [row["reason"] for row in get_cache_trace(flux.transformer)]
    assert reasons == ["steps mask"] * 2 + ["not finite"] * 2 + ["steps mask"] * 4
    assert found.isfinite().all()
    assert torch.equal(flux(), healthy)


def test_after_a_nan_the_gate_knows_of_no_anchor_before_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the forecaster does, which forgets them: two anchors are another cell than one."""
    stack = Stack(forecaster="taylor", num_warmup_steps=2, max_consecutive_skips=2)
    asked, judge = [], ChiSquareGate.judge
    monkeypatch.setattr(
        ChiSquareGate, "judge", lambda gate, e, _: asked.append(e.noise_levels) or judge(gate, e)
    )
    held = []
    levels = [1 - step / 10 for step in range(9)]
    for step, level in enumerate(levels):
        stack(ones(torch.nan if step == 4 else 1.0), level)
        held.append(tuple(a.noise_level for a in stack.engine.branches[0].memories[0][-1].anchors))
    assert stack.flags == [0, 0, 1, 1, 0, 0, 1, 1, 0]
    # Steps 2, 3, 6 and 7 were asked about, and skipped with these anchors.
    assert [(newest, before) for _, newest, before in asked] == [
        (*held[step], None)[:2] for step in (2, 3, 6, 7)
    ]
    assert [len(held[step]) for step in (2, 3, 6, 7)] == [2, 2, 1, 1]


@pytest.mark.parametrize("left", [0, 1])
def test_a_span_whose_output_was_not_seen_cannot_be_skipped_by_a_mask(left: int) -> None:
    """The model leaves out the last block of a span; alike at the next step, or not."""
    stack = Stack(granularity=2, steps_mask=[1, 0, 1], num_steps=3)
    left_out(stack, 1, ones(), 1.0)
    with pytest.raises(RuntimeError, match="steps_mask skips span 0 at .* step 1.* not known"):
        left_out(stack, 1, ones(), 0.9) if left else stack(ones(), 0.9)
    stack.engine.abandon(RuntimeError())
    assert torch.equal(stack(ones(), 1.0), ones())


@pytest.mark.parametrize("lag", [1, 2])
def test_a_pipeline_skips_by_the_mask_from_its_first_patched_step_on(lag: int) -> None:
    stack = Stack(group=TWO_STAGES, steps_mask=[1, 0, 0, 0, 1, 0], num_steps=6)
    stack.engine.agreement.lag = lag
    for step in range(6):
        pipelined(stack, ones(), 1 - step / 10, patched=step > 1)
    reasons = [decision.judgements[0].reason for decision in stack.engine.decisions.decisions]
    assert stack.flags == [0, 0, 1, 1, 0, 1]
    assert reasons[1] == "synchronous step of the pipeline"
    assert {*reasons[:1], *reasons[2:]} == {"steps mask"}


def test_a_branch_that_first_comes_at_a_skipped_step_is_computed() -> None:
    stack = Stack(steps_mask=[1, 0, 0], num_steps=3)
    for level in (1.0, 0.9, 0.8):
        stack(ones(), level)
        if level < 1.0:
            stack(ones(), level)
    flags = [entry[1:] for entry in stack.engine.decisions.entries]
    assert flags == [(0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 1), (2, 1, 1)]


# ---- a pipeline that enters the plan in the middle ----------------------------------------------


def test_a_generation_that_begins_in_the_middle_goes_by_its_place_in_the_plan() -> None:
    stack = Stack(steps_mask=[1, 1, 0, 0, 1, 0])
    levels = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    plan = Schedule(torch.tensor(levels), tuple(Step(level, level) for level in levels))
    for level in levels[2:]:
        stack.engine.open(level, level, None, Position(), torch.device("cpu"), plan)
        x = ones()
        for index in range(4):
            x = stack.engine.run_block(index, stack._block(index), (x,), {})
        stack.engine.close()
    calls = [decision.call for decision in stack.engine.decisions.decisions]
    assert [(call.step, call.planned_step) for call in calls] == [(0, 2), (1, 3), (2, 4), (3, 5)]
    # The first step is to be skipped, but there is no anchor yet.
    reasons = [decision.judgements[0].reason for decision in stack.engine.decisions.decisions]
    assert (stack.flags, reasons[0]) == ([0, 1, 0, 1], "no anchor")


def tiny_vae() -> AutoencoderKL:
    """A random VAE that makes 16 x 16 latents of 128 x 128 pixels."""
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    sizes: dict[str, Any] = {"block_out_channels": (4,) * 4, "norm_num_groups": 2}
    sizes |= {"latent_channels": 4, "layers_per_block": 1, "shift_factor": 0.0}
    return AutoencoderKL(down_block_types=down, up_block_types=up, **sizes)


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

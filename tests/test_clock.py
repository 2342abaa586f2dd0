"""The clock in real pipelines, where the values of timesteps would mislead it.

Plans are those of pictures of 1024 to 2048 pixels; what is drawn is tiny, since only the plan
matters. In bf16 many of their steps have a timestep in common, which one test shows first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
)
from diffusers.pipelines.flux import pipeline_flux
from support.calibrations import fitted_for
from support.flux import GUIDED, Flux, tiny_vae
from support.turns import Pipeline

from xfuser_fastcache import get_cache_statistics, get_cache_trace, remove_cache
from xfuser_fastcache.apply import adapter_of

FLOAT, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIZES, COUNTS = (1024, 1536, 2048), (28, 40, 50, 100)
# In bf16, where it is hardest, all of them.
CASES = [
    *((BF16, size, steps) for size in SIZES for steps in COUNTS),
    *((dtype, size, steps) for dtype in (FLOAT, FP16) for size, steps in ((1536, 50), (2048, 100))),
]
every_case = pytest.mark.parametrize(
    ("dtype", "size", "steps"), CASES, ids=lambda value: str(value).removeprefix("torch.")
)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Drawn(Flux):
    """A FLUX of two blocks that goes by the plan of a large picture and draws a tiny one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int):
        super().__init__(num_layers=1, num_single_layers=1)
        shift = pipeline_flux.calculate_shift((size // 16) ** 2)
        monkeypatch.setattr(pipeline_flux, "calculate_shift", lambda *_: shift)
        self.pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        self.to(dtype)
        self.call |= {"height": 32, "width": 32}


def mask_of(steps: int) -> list[int]:
    """Return a mask that computes about every third step, at no even distance."""
    return [int(step < 2 or step % 7 in (0, 3)) for step in range(steps)]


def decisions(transformer: Any, branch: int = 0) -> list[str]:
    """Return what was decided of the first span at each step of a branch."""
    rows = get_cache_trace(transformer)
    return [row["decision"] for row in rows if row["branch"] == branch and row["span"] == 0]


def followed(mask: list[int]) -> list[str]:
    return ["scheduled" if computed else "skipped" for computed in mask]


def assert_one_generation(transformer: Any, steps: int, clock: str = "scheduler") -> None:
    found = get_cache_statistics(transformer)
    assert (found["generations"], found["steps"], found["clock"]) == (1, steps, clock)


def save(tmp_path: Path, pipe: Any, steps: int, **changes: Any) -> str:
    """Write a calibration for what the pipeline's scheduler has planned last."""
    plan = adapter_of(pipe.transformer).plan(pipe.scheduler)
    levels = [step.noise_level for step in plan]
    fitted_for(pipe, steps, levels=levels, **changes).save(tmp_path / "calibration")
    return str(tmp_path / "calibration")


# ---- large plans --------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "steps"), [(1536, 50), (2048, 28), (1024, 100)])
def test_a_transformer_in_bf16_is_given_one_timestep_for_several_steps(
    monkeypatch: pytest.MonkeyPatch, size: int, steps: int
) -> None:
    """Else the tests below would show nothing."""
    flux, seen = Drawn(monkeypatch, BF16, size), []
    flux.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["timestep"].item()), with_kwargs=True
    )
    flux(num_inference_steps=steps)
    assert len(seen) == steps > len(set(seen))


@every_case
def test_a_mask_is_followed_to_the_step_in_one_generation(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, steps: int
) -> None:
    flux, mask = Drawn(monkeypatch, dtype, size).cache(steps_mask=mask_of(steps)), mask_of(steps)
    flux(num_inference_steps=steps)
    assert decisions(flux.transformer) == followed(mask)
    assert_one_generation(flux.transformer, steps)
    # Noise levels come in the scheduler's precision, and fall at every step.
    levels = [row["noise_level"] for row in get_cache_trace(flux.transformer)]
    assert all(a > b for a, b in zip(levels, levels[1:], strict=False))


@pytest.mark.parametrize("scheduler", [True, False], ids=["given", "found"])
@pytest.mark.parametrize("size", SIZES)
def test_a_mask_is_followed_by_both_calls_of_a_guided_step(
    monkeypatch: pytest.MonkeyPatch, size: int, scheduler: bool
) -> None:
    flux, mask = Drawn(monkeypatch, BF16, size), mask_of(28)
    guided = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in GUIDED.items()}
    flux.cache(scheduler=scheduler, steps_mask=mask)
    flux(num_inference_steps=28, **guided)
    assert [decisions(flux.transformer, branch) for branch in (0, 1)] == [followed(mask)] * 2
    assert_one_generation(flux.transformer, 28)


@every_case
def test_a_calibration_runs(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    size: int,
    steps: int,
    tmp_path: Path,
) -> None:
    flux = Drawn(monkeypatch, dtype, size)
    flux(num_inference_steps=steps)
    path = save(tmp_path, flux.pipe, steps, metadata={"cache_ratio_threshold": 50.0})
    flux.cache(calibration=path, cache_ratio_threshold=50.0)
    assert flux(num_inference_steps=steps).isfinite().all()
    assert_one_generation(flux.transformer, steps)
    rows = get_cache_trace(flux.transformer)
    assert len(rows) == steps and rows[-1]["reason"] == "last step"
    assert "skipped" in decisions(flux.transformer)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["float32", "bf16"])
def test_generations_repeat_whatever_was_drawn_between(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    flux = Drawn(monkeypatch, dtype, 2048).cache()
    counts = (28, 50, 3, 28, 50)
    latents = [flux(num_inference_steps=steps) for steps in counts]
    assert torch.equal(latents[0], latents[3]) and torch.equal(latents[1], latents[4])
    found = get_cache_statistics(flux.transformer)
    assert (found["generations"], found["steps"]) == (len(counts), sum(counts))


# ---- what changes within a picture --------------------------------------------------------------

STEPS = 16


def halved_after(step: int) -> dict[str, Any]:
    """Return a callback that ends guidance, as diffusers' guide has it: it halves SD3's batch."""

    def switch_off(pipe: Any, index: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index != step:
            return {}
        pipe._guidance_scale = 0.0
        return {name: value[-1:] for name, value in given.items()}

    return {
        "callback_on_step_end": switch_off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"],
    }


SKIPS_LAYERS = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_start": 0.1,
    "skip_layer_guidance_stop": 0.6,
}
# What changes -> step -> branches that are called at it.
CHANGES = {
    "skip-layer guidance": (SKIPS_LAYERS, {s: [0, 1] if 2 <= s < 10 else [0] for s in range(16)}),
    "guidance that ends": (halved_after(10), {s: [int(s > 10)] for s in range(16)}),
}


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "uncalibrated"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_whose_guidance_changes_is_finished(
    change: str, calibrated: bool, tmp_path: Path
) -> None:
    pipe = Pipeline("sd3")
    given, called = CHANGES[change]
    given = {**given, "num_inference_steps": STEPS}
    uncached = pipe(**given)
    options: dict[str, Any] = {"num_warmup_steps": 1}
    if calibrated:
        # Far above what random weights change from step to step.
        often = {"cache_ratio_threshold": 50.0}
        options = {"calibration": save(tmp_path, pipe.pipe, STEPS, metadata=often), **often}
    pipe.cache(**options)
    found = pipe(**given)
    assert found.isfinite().all() and not torch.equal(found, uncached)
    assert_one_generation(pipe.transformer, STEPS)
    rows = get_cache_trace(pipe.transformer)
    assert {s: [r["branch"] for r in rows if r["step"] == s] for s in range(STEPS)} == called
    # What has no anchors is computed, and counted as that; then it is forecast like all others.
    of_new = [row for row in rows if row["branch"] == 1]
    assert (of_new[0]["decision"], of_new[0]["reason"]) == ("forced", "no anchor")
    assert "skipped" in [row["decision"] for row in of_new]
    assert torch.equal(pipe(**given), found)


def test_a_mask_is_followed_by_branches_that_come_and_go() -> None:
    mask = mask_of(STEPS)
    pipe = Pipeline("sd3").cache(steps_mask=mask)
    pipe(num_inference_steps=STEPS, **SKIPS_LAYERS)
    assert decisions(pipe.transformer) == followed(mask)
    rows = [row for row in get_cache_trace(pipe.transformer) if row["branch"] == 1]
    assert [row["step"] for row in rows] == list(range(2, 10))
    # Its first step has no anchor.
    assert [row["decision"] for row in rows] == ["forced", *followed(mask)[3:10]]


def test_layers_that_change_within_a_picture_are_computed_again_where_a_forecast_has_no_place() -> (
    None
):
    """The last block of a skipped span is left out: the forward pass runs once more, as it is."""
    steps = 8
    mask = [1, 0, 0, 1, 1, 1, 1, 1]

    def drawn(cached: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        pipe = Pipeline("sd3")
        if cached:
            pipe.cache(steps_mask=mask, forecaster="reuse")
        calls = []

        def leave_out(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            calls.append(1)
            return args, kwargs | ({"skip_layers": [3]} if len(calls) == 2 else {})

        inner = pipe.transformer
        handle = inner.register_forward_pre_hook(leave_out, with_kwargs=True)
        latents = pipe(num_inference_steps=steps)
        handle.remove()
        return latents, get_cache_statistics(inner) if cached else {}

    found, statistics = drawn(True)
    assert statistics["recomputed"] == 1
    assert (statistics["generations"], statistics["steps"]) == (1, steps)
    # Step 2 has no anchor then, and is computed: so nothing was skipped in the end.
    assert torch.equal(found, drawn(False)[0])
    assert statistics["estimated_flops_saved_ratio"] == pytest.approx(0)


def test_a_controlnet_that_ends_at_half_changes_no_step() -> None:
    flux, mask = Flux(), mask_of(STEPS)
    torch.manual_seed(0)
    config = flux.transformer.config
    controlnet = FluxControlNetModel.from_transformer(
        flux.transformer,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
    ).eval()
    for layer in (*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks):
        torch.nn.init.normal_(layer.weight, std=0.5)
    pipe = FluxControlNetPipeline(
        **{**dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))},
        scheduler=flux.pipe.scheduler,
        vae=tiny_vae(),
        transformer=flux.transformer,
        controlnet=controlnet,
    )
    pipe.set_progress_bar_config(disable=True)

    def draw(end: float) -> torch.Tensor:
        call = flux.call | {"num_inference_steps": STEPS, "control_image": torch.ones(1, 3, 64, 64)}
        call |= {"generator": torch.Generator().manual_seed(0), "height": 64, "width": 64}
        return pipe(**call, control_guidance_end=end).images

    flux.cache(steps_mask=mask)
    latents = draw(0.5)
    assert decisions(flux.transformer) == followed(mask)
    assert_one_generation(flux.transformer, STEPS)
    assert latents.isfinite().all() and not torch.equal(latents, draw(1.0))


# ---- other ways through a plan ------------------------------------------------------------------


def test_heuns_two_calls_a_step_are_two_entries_of_the_mask() -> None:
    pipe = Pipeline("sd3")
    pipe.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    calls = 2 * 6 - 1
    mask = mask_of(calls)
    pipe.cache(steps_mask=mask)
    assert pipe(num_inference_steps=6).isfinite().all()
    assert decisions(pipe.transformer) == followed(mask)
    assert_one_generation(pipe.transformer, calls)
    remove_cache(pipe.transformer)
    pipe.cache(steps_mask=mask[:6])
    with pytest.raises(ValueError, match="steps_mask has 6 entries, .* has 11 steps"):
        pipe(num_inference_steps=6)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["float32", "bf16"])
def test_image_to_image_enters_the_plan_where_its_strength_says(dtype: torch.dtype) -> None:
    flux, mask = Flux(), mask_of(20)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxImg2ImgPipeline(
        scheduler=flux.pipe.scheduler, transformer=flux.transformer, vae=tiny_vae(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    flux.to(dtype)
    pipe.to(dtype)
    flux.cache(scheduler=False, steps_mask=mask)
    picture = torch.zeros(1, 3, 128, 128)
    pipe(**flux.call | {"num_inference_steps": 20, "strength": 0.3, "image": picture})
    assert decisions(flux.transformer) == followed(mask)[14:]
    assert_one_generation(flux.transformer, 6)

"""One calibration for Wan: guidance in calls that come one after the other, and two experts.

Tiny pipelines with random weights, in one process. The command's own run is one of two experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.calibrations import fitted_for
from support.worlds import ROOT
from transformers import AutoTokenizer, T5EncoderModel

from diffusers_adapters.tiny import TINY_PIPELINES
from diffusers_adapters.tiny.wan import tiny_wan, tiny_wan_vae
from diffusers_adapters.wan import WanAdapter
from xfuser_fastcache import get_cache_statistics, get_cache_trace
from xfuser_fastcache.apply import (
    apply_cache_on_pipeline,
    denoisers_of,
    remove_cache_from_pipeline,
    replace_forecaster,
)
from xfuser_fastcache.artifacts.calibration import OTHERS, fingerprint, load_fitted
from xfuser_fastcache.calibration.masks import entered, improved
from xfuser_fastcache.calibration.options import RunOptions
from xfuser_fastcache.calibration.runs import Runs
from xfuser_fastcache.calibration.steering import FullRun, Observer, SteeringForecaster
from xfuser_fastcache.cli import main
from xfuser_fastcache.hooks import hook_on

STEPS, SWITCH, VIDEOS, FITTED = 10, 4, 6, 4
MASK = [1, 1, 0, 1, 1, 0, 1, 0, 0, 1]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


class Steered:
    """A tiny pipeline whose batch is drawn in full, masked, and with corrections fitted to it."""

    def __init__(self, name: str):
        self.pipe, self.call = TINY_PIPELINES[name](batch=VIDEOS)
        self.pipe.set_progress_bar_config(disable=True)
        self.call["num_inference_steps"] = STEPS
        self.denoisers = tuple(denoisers_of(self.pipe).values())
        with self.observer() as observer:
            self.uncached = self()
        self.full = FullRun.of(observer, self.uncached, FITTED)

    def __call__(self) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in range(VIDEOS)]
        return self.pipe(**{**self.call, "generator": noise}).frames

    def observer(self) -> Observer:
        return Observer(self.denoisers, WanAdapter, VIDEOS, 4096)

    def masked(self, **options: Any) -> torch.Tensor:
        apply_cache_on_pipeline(self.pipe, steps_mask=MASK, **options)
        try:
            return self()
        finally:
            remove_cache_from_pipeline(self.pipe)

    def fit(self) -> tuple[torch.Tensor, np.ndarray]:
        apply_cache_on_pipeline(self.pipe, steps_mask=MASK, forecaster="output")
        with self.observer() as observer:
            forecaster = SteeringForecaster(self.full, observer)
            for denoiser in self.denoisers:
                replace_forecaster(denoiser, forecaster)
            found = self()
        remove_cache_from_pipeline(self.pipe)
        return found, forecaster.found

    def calibrated(self, weights: np.ndarray, path: Path) -> torch.Tensor:
        """Run the mask with a calibration that holds these weights, a branch's own."""
        plan = WanAdapter.plan(self.pipe.scheduler)
        others = [
            fingerprint(one, WanAdapter.model_class, WanAdapter.embedder, len(one.blocks))
            for one in self.denoisers[1:]
        ]
        fitted_for(
            self.pipe,
            STEPS,
            levels=[step.noise_level for step in plan],
            masks={sum(MASK): MASK},
            steering=np.ones((1, STEPS, 5), np.float32),
            steering_guided=weights[None],
            metadata={OTHERS: others},
        ).save(path)
        return self.masked(calibration=str(path))


@pytest.fixture(scope="module", params=["wan", "wan22", "wan22-i2v"])
def steered(request: pytest.FixtureRequest) -> Steered:
    with torch.no_grad():
        return Steered(request.param)


def test_a_schedulers_step_is_read_off_two_steps_back(steered: Steered) -> None:
    """UniPC corrects what it predicted from the output before last."""
    assert steered.full.apart and [len(outputs) for outputs in steered.full.outputs] == [2] * STEPS
    assert steered.full.entries == (() if len(steered.denoisers) == 1 else (SWITCH,))
    assert [len(update.before) for update in steered.full.updates] == [0, 1, 1, *[2] * 6, 1]
    scale = steered.pipe.guidance_scale
    for update in steered.full.updates:
        wanted = torch.tensor([scale, 1 - scale])  # the call with the prompt comes first
        torch.testing.assert_close(update.outputs / update.outputs.sum(), wanted, rtol=0, atol=0.02)


def test_each_call_has_corrections_of_its_own_and_they_bring_the_video_nearer(
    steered: Steered, tmp_path: Path
) -> None:
    plain = steered.masked(forecaster="output")
    found, weights = steered.fit()
    for videos in (slice(FITTED), slice(FITTED, None)):  # those fitted on, and others
        before, after = (error(x[videos], steered.uncached[videos]) for x in (plain, found))
        assert after < 0.6 * before
    assert weights.shape == (STEPS, 2, 5)
    # From the first skipped step on, but where an expert has no anchor to correct by.
    first = MASK.index(0)
    wanted = [step >= first and step not in steered.full.entries for step in range(STEPS)]
    assert weights.any(axis=(1, 2)).tolist() == wanted
    without, with_it = weights[first]
    assert not np.allclose(without, with_it, rtol=1e-3)
    # A file holds them for the one and the other, whichever comes first.
    assert torch.equal(steered.calibrated(weights, tmp_path / "file"), found)
    turned = steered.calibrated(weights[:, ::-1].copy(), tmp_path / "turned")
    assert error(turned, steered.uncached) > 1.02 * error(found, steered.uncached)


def test_calls_without_names_are_refused_for_masks(steered: Steered) -> None:
    """Which of them is guided is not known."""
    apply_cache_on_pipeline(steered.pipe, steps_mask=MASK, forecaster="output")
    try:
        with steered.observer() as observer:
            forecaster = SteeringForecaster(steered.full, observer)
            forecaster.on_branch = lambda guided: forecaster  # type: ignore[method-assign]
            for denoiser in steered.denoisers:
                replace_forecaster(denoiser, forecaster)
            with pytest.raises(ValueError, match="need the names cond and uncond of cache_context"):
                steered()
    finally:
        remove_cache_from_pipeline(steered.pipe)


def test_masks_compute_where_another_denoiser_takes_over() -> None:
    assert entered([1, 0, 0, 1, 0, 0, 1], [4]) == [1, 0, 0, 0, 1, 0, 1]
    assert entered([1, 0, 0, 1, 0, 0, 1], [3]) == [1, 0, 0, 1, 0, 0, 1]
    assert entered([1, 1, 0, 0, 0, 0], [2, 5]) == [1, 0, 1, 0, 0, 0]
    tried: list[list[int]] = []
    improved(0.0, MASK, 99, lambda mask: tried.append(mask) or 0.0, seed=0, entries=[SWITCH])
    assert tried and all(mask[SWITCH] and sum(mask) == sum(MASK) for mask in tried)


# ---- the command -------------------------------------------------------------------------------

CALL = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 4.0}
CALL["max_sequence_length"] = 16


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `fastcache calibrate` makes of two experts, and the audit of it."""
    folder = tmp_path_factory.mktemp("wan22")
    toy = ROOT / "toys" / "flux"
    text_encoder = T5EncoderModel.from_pretrained(toy / "text_encoder_2")
    tokenizer = AutoTokenizer.from_pretrained(toy / "tokenizer_2")
    pipe, _ = tiny_wan(experts=2, text_dim=text_encoder.config.d_model)
    pipe.register_modules(vae=tiny_wan_vae(), text_encoder=text_encoder, tokenizer=tokenizer)
    pipe.save_pretrained(folder / "model")
    file, report = folder / "wan22.safetensors", folder / "audit.json"
    common = [
        "--model", str(folder / "model"), "--num_inference_steps", str(STEPS),
        "--call", json.dumps(CALL), "--dtype", "float32", "--progress", "none",
    ]  # fmt: skip
    arguments = [
        "--cache_ratio_threshold", "0.2", "--significance_level", "0.5", "--max_lag", "4",
        "--num_prompts", "8", "--computed_steps", "5", "--moves", "2", "--batch_size", "6",
    ]  # fmt: skip
    with torch.no_grad():
        assert main(["calibrate", *common, *arguments, "--output", str(file)]) == 0
        audited = ["--seed", "2", "--num_prompts", "4", "--report", str(report)]
        assert main(["audit", str(file), *common, *audited]) == 0
    return {"model": str(folder / "model"), "file": file, "audit": json.loads(report.read_text())}


def runs_of(calibrated: dict[str, Any], steps: int = STEPS) -> Runs:
    prompts = [f"a ring on {colour}" for colour in ("red", "blue", "black", "white")]
    options = RunOptions(
        model=calibrated["model"],
        num_inference_steps=steps,
        seed=7,
        call=CALL,
        dtype="float32",
    )
    return Runs(options, prompts)


def decided(runs: Runs) -> dict[int, str]:
    """Return step -> decision of the first branch, of both experts."""
    rows = [row for one in runs.denoisers.values() for row in get_cache_trace(one)]
    return {row["step"]: row["decision"] for row in rows if row["branch"] == 0}


@pytest.mark.slow
def test_one_file_holds_a_segment_for_each_expert(calibrated: dict[str, Any]) -> None:
    fitted = load_fitted(calibrated["file"])
    (mask,) = fitted.masks.values()
    assert (sum(mask), mask[SWITCH]) == (5, 1)
    runs = runs_of(calibrated)
    one, two = (
        fingerprint(expert, WanAdapter.model_class, WanAdapter.embedder, 3)
        for expert in runs.denoisers.values()
    )
    assert one != two and fitted.metadata[OTHERS] == [two]
    assert {name: fitted.metadata[name] for name in one} == one
    seen = np.isfinite(fitted.slopes)
    for step, lag, spacing in np.argwhere(seen):
        last = step - lag - 1
        assert (last - spacing >= SWITCH) == (step >= SWITCH)  # no forecast crosses
    assert seen[SWITCH - 1].any() and seen[SWITCH + 1].any() and not seen[SWITCH].any()
    guided = fitted.steering_guided[0]
    for segment in (slice(0, SWITCH), slice(SWITCH, STEPS)):
        assert guided[segment].any() or all(mask[segment])
    assert not np.allclose(guided[:, 0], guided[:, 1], rtol=1e-3)


@pytest.mark.slow
def test_the_file_serves_both_experts_and_is_nearer_than_its_mask_alone(
    calibrated: dict[str, Any],
) -> None:
    fitted = load_fitted(calibrated["file"])
    (mask,) = fitted.masks.values()
    runs = runs_of(calibrated)
    batch = range(len(runs.prompts))
    full = runs.latents(*batch)
    plain = runs.latents(*batch, steps_mask=mask)
    found: dict[str, torch.Tensor] = {}
    path = str(calibrated["file"])
    for how in ({"computed_steps": 5}, {"steps_mask": mask}):
        found[str(how)] = runs.latents(*batch, calibration=path, **how)
    one, other = found.values()
    assert torch.equal(one, other)
    assert error(one, full) < 0.8 * error(plain, full)
    apply_cache_on_pipeline(runs.pipe, calibration=path, computed_steps=5)
    runs.latents(0)
    words = {step: "scheduled" if computed else "skipped" for step, computed in enumerate(mask)}
    assert decided(runs) == words
    for name, expert in runs.denoisers.items():
        assert get_cache_statistics(expert)["clock"] == "scheduler", name
    remove_cache_from_pipeline(runs.pipe)


@pytest.mark.slow
def test_the_gate_skips_in_both_experts_and_never_over_the_boundary(
    calibrated: dict[str, Any],
) -> None:
    found = calibrated["audit"]["levels"]["0.5"]
    assert found["skips"] > 0 and found["false_skip_rate"] <= 0.5
    runs = runs_of(calibrated)
    path = str(calibrated["file"])
    apply_cache_on_pipeline(runs.pipe, calibration=path, significance_level=0.5)
    runs.latents(0)
    decisions = decided(runs)
    assert decisions[SWITCH] == "forced" and decisions[STEPS - 1] == "forced"
    skipped = [step for step, word in decisions.items() if word == "skipped"]
    assert any(step < SWITCH for step in skipped) and any(step > SWITCH for step in skipped)
    remove_cache_from_pipeline(runs.pipe)


@pytest.mark.slow
def test_other_numbers_of_steps_go_on_without_it_in_both_experts(
    calibrated: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The second expert enters in the middle, and must not go by the file's plan either."""
    runs = runs_of(calibrated, steps=16)
    path = str(calibrated["file"])
    with caplog.at_level("WARNING", "xfuser_fastcache"):
        apply_cache_on_pipeline(runs.pipe, calibration=path, computed_steps=5)
        runs.latents(0)
        decisions = decided(runs)
        remove_cache_from_pipeline(runs.pipe)
    assert "it plans 10 steps, this one 16" in caplog.text
    assert "computed_steps=5 is spread evenly" in caplog.text
    bare = runs_of(calibrated, steps=16)
    apply_cache_on_pipeline(bare.pipe, computed_steps=5)
    bare.latents(0)
    assert decisions == decided(bare)
    remove_cache_from_pipeline(bare.pipe)


@pytest.mark.slow
def test_a_file_of_other_experts_is_refused(calibrated: dict[str, Any], tmp_path: Path) -> None:
    fitted = load_fitted(calibrated["file"])
    metadata = {**fitted.metadata, OTHERS: []}
    replace(fitted, metadata=metadata).save(tmp_path / "first.safetensors")
    runs = runs_of(calibrated)
    with pytest.raises(ValueError, match="was made for another model"):
        apply_cache_on_pipeline(
            runs.pipe, calibration=str(tmp_path / "first.safetensors"), computed_steps=5
        )
    assert [hook_on(denoiser) for denoiser in runs.denoisers.values()] == [None, None]

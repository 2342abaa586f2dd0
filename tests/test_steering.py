"""Corrections for a mask: what is read off a scheduler, what is fitted, and that it runs so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.calibrations import fitted_for

from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import apply_cache_on_transformer, remove_cache
from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.calibration.steering import (
    FullRun,
    Observer,
    SteeringForecaster,
    updates_of,
)
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.models.forward_layout import ForwardContract

STEPS, PICTURES, FITTED = 8, 4, 3
MASK = [1, 1, 1, 0, 1, 0, 0, 1]
every_family = pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Model:
    """A tiny pipeline that repeats one batch of pictures."""

    def __init__(self, family: str, **call: Any):
        self.pipe, self.call = TINY_PIPELINES[family](batch=PICTURES)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer
        self.call |= {"num_inference_steps": STEPS, **call}

    def __call__(self) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in range(PICTURES)]
        return self.pipe(**{**self.call, "generator": generator}).images

    def full(self, max_tokens: int = 4096) -> FullRun:
        with self.observer(max_tokens) as observer:
            self.uncached = self()
        return FullRun.of(observer, self.uncached, FITTED)

    def observer(self, max_tokens: int = 4096) -> Observer:
        return Observer(self.transformer, PICTURES, max_tokens)

    def masked(self, **options: Any) -> torch.Tensor:
        apply_cache_on_transformer(
            self.transformer, scheduler=self.pipe.scheduler, steps_mask=MASK, **options
        )
        try:
            return self()
        finally:
            remove_cache(self.transformer)

    def steered(
        self, full: FullRun, max_tokens: int = 4096, **options: Any
    ) -> tuple[torch.Tensor, np.ndarray]:
        apply_cache_on_transformer(
            self.transformer, scheduler=self.pipe.scheduler, steps_mask=MASK, forecaster="output"
        )
        with self.observer(max_tokens) as observer:
            forecaster = SteeringForecaster(full, observer, **options)
            hook_on(self.transformer).engine.forecaster = forecaster
            found = self()
        remove_cache(self.transformer)
        return found, forecaster.found


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---- what is read off a scheduler ---------------------------------------------------------------


@every_family
def test_a_schedulers_step_is_found_off_the_path_it_was_read_from(family: str) -> None:
    """The latents that the pipeline makes of a perturbed output are those that follow from it."""
    model = Model(family)
    full = model.full()
    changed = 5

    def perturb(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        contract = ForwardContract()
        streams = contract.unpack(output)
        if len(observer.outputs) == changed:
            seed = torch.Generator().manual_seed(3)
            noise = torch.randn(streams.hidden_states.shape, generator=seed)
            streams = streams.map(lambda x: x + noise)
        return contract.pack(streams)

    handle = model.transformer.register_forward_hook(perturb, with_kwargs=True)
    with model.observer() as observer:
        model()
    handle.remove()
    for step in (changed, changed + 1):
        update, before = full.updates[step], step - 1
        made = update.latents * observer.latents[step]
        made = made + torch.tensordot(update.outputs, observer.outputs[step], dims=1)
        made = made + update.latents_before * observer.latents[before]
        made = made + torch.tensordot(update.outputs_before, observer.outputs[before], dims=1)
        assert error(made, observer.latents[step + 1]) < 1e-4
        assert error(observer.latents[step + 1], full.latents[step + 1]) > 1e-2


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_is_read_off_with_the_step(scale: float) -> None:
    full = Model("sd3", guidance_scale=scale).full()
    for update in full.updates:
        wanted = torch.tensor([1 - scale, scale])
        torch.testing.assert_close(update.outputs / update.outputs.sum(), wanted, rtol=0, atol=0.02)
        assert len(full.outputs[0]) == 2


def test_a_scheduler_that_is_not_linear_is_refused_with_its_step() -> None:
    seed = torch.Generator().manual_seed(0)
    latents = [torch.randn(2, 8, 3, generator=seed) for _ in range(4)]
    outputs = [torch.randn(1, 2, 8, 3, generator=seed) for _ in range(3)]
    for step in range(2):
        latents[step + 1] = latents[step] - 0.1 * outputs[step][0]
    latents[3] = latents[2] * outputs[2][0]
    with pytest.raises(ValueError, match="step 2 is not linear in latents and noise predictions"):
        updates_of(latents, outputs)


# ---- what is fitted -----------------------------------------------------------------------------


def test_the_patches_of_a_step_add_up_to_all_of_it() -> None:
    """A pipeline's stage sees a patch after the other; the last one's weights are the step's."""
    model, step = Model("sd3"), 5
    full = model.full()
    observer = model.observer()
    seed = torch.Generator().manual_seed(0)
    moved = [x + 0.1 * torch.randn(x.shape, generator=seed) for x in full.latents]
    observer.latents, observer.outputs = moved[:step], full.outputs[:step]
    plain, *terms = (torch.randn(full.outputs[step].shape, generator=seed) for _ in range(4))
    forecaster = SteeringForecaster(full, observer)
    whole = forecaster._fit(step, moved[step], plain, terms)

    def of(at: slice) -> np.ndarray:
        cut = [term[:, :, at] for term in terms]
        observer.tokens_at_work = lambda count: at  # type: ignore[method-assign]
        return forecaster._fit(step, moved[step][:, at], plain[:, :, at], cut)

    tokens = plain.shape[2]
    first, *_, last = (of(slice(i, i + tokens // 4)) for i in range(0, tokens, tokens // 4))
    np.testing.assert_allclose(last, whole, rtol=1e-4)
    assert not np.allclose(first, whole, rtol=1e-2)
    # The next step, or another run of this one, begins anew.
    np.testing.assert_allclose(of(slice(0, tokens // 4)), first, rtol=1e-6)


@every_family
def test_steered_pictures_are_nearer_to_full_computation(family: str) -> None:
    model = Model(family)
    full = model.full()
    plain = model.masked(forecaster="output")
    found, weights = model.steered(full)
    before, after = (error(x[:FITTED], model.uncached[:FITTED]) for x in (plain, found))
    assert after < 0.98 * before
    assert weights.shape == (STEPS, 5)
    # From the first skipped step on; until then nothing has gone astray.
    assert weights.any(axis=1).tolist() == [step >= MASK.index(0) for step in range(STEPS)]


def calibrated(model: Model, weights: np.ndarray, path: Path, **tables: Any) -> torch.Tensor:
    """Run the mask with a calibration that holds these weights."""
    plan = adapter_of(model.transformer).plan(model.pipe.scheduler)
    fitted = fitted_for(
        model.pipe,
        STEPS,
        levels=[step.noise_level for step in plan],
        masks={sum(MASK): MASK},
        steering=weights[None].astype(np.float32),
        **tables,
    )
    fitted.save(path)
    return model.masked(calibration=str(path))


@every_family
def test_a_calibration_runs_a_mask_as_it_was_fitted(family: str, tmp_path: Path) -> None:
    model = Model(family)
    found, weights = model.steered(model.full())
    assert torch.equal(calibrated(model, weights, tmp_path / "file"), found)


@every_family
def test_a_computed_step_mends_what_the_forecasts_before_it_left(
    family: str, tmp_path: Path
) -> None:
    """The last step is computed: what it puts out leads nearer to the full run's picture."""
    model = Model(family)
    found, weights = model.steered(model.full())
    assert MASK[-1]
    weights[-1] = 0
    left = calibrated(model, weights, tmp_path / "file")
    mended, before = (error(x[:FITTED], model.uncached[:FITTED]) for x in (found, left))
    assert mended < 0.99 * before


def test_weights_a_branch_bring_pictures_nearer_still() -> None:
    model = Model("sd3", guidance_scale=6.0)
    full = model.full()
    common, by_branch = (model.steered(full, by_branch=own)[0] for own in (False, True))
    before, after = (error(x[:FITTED], model.uncached[:FITTED]) for x in (common, by_branch))
    assert after < 0.98 * before


@pytest.mark.parametrize("family", ["sd3", "pixart"])
def test_with_guidance_each_branch_has_weights_of_its_own(family: str, tmp_path: Path) -> None:
    model = Model(family)
    found, weights = model.steered(model.full(), by_branch=True)
    assert weights.shape == (STEPS, 2, 5)
    # The latents are the same in both.
    without, with_it = weights[-1]
    assert (without == with_it).tolist() == [False, True, False, True, False]
    ran = calibrated(model, np.ones((STEPS, 5)), tmp_path / "file", steering_guided=weights[None])
    assert torch.equal(ran, found)


def test_weights_are_fitted_on_the_first_pictures_alone() -> None:
    model = Model("flux")
    full = model.full()
    _, wanted = model.steered(full)
    others = [x.clone() for x in full.latents]
    for x in others:
        x[FITTED:] = 7.0
    _, found = model.steered(FullRun(others, full.outputs, full.updates, FITTED))
    np.testing.assert_array_equal(found, wanted)


def test_of_a_large_picture_an_even_selection_steers() -> None:
    model = Model("flux")
    full = model.full(max_tokens=16)
    assert {x.shape[1] for x in full.latents} == {16}
    found, _ = model.steered(full, max_tokens=16)
    plain = model.masked(forecaster="output")
    assert error(found, model.uncached) < error(plain, model.uncached)

"""Forecasts of the clean latents: against diffusers' schedulers, and on models that know them.

Layers: the mixture of latents and prediction at a noise level; the forecaster on plain tensors;
tiny pipelines whose model always points at one picture. `tests/test_matrix.py` runs every layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_adapters.pixart import PixArtAdapter
from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache
from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.forecasters.data import HANDED_ON, DataForecaster
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.models.forward_layout import ForwardContract, ForwardLayout
from xfuser_fastcache.models.noise import FlowSigma, Mixture, NoiseAngle
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory

ANGLE = NoiseAngle((0.0001, 0.02))
MIXTURES: dict[str, Callable[[float], Mixture]] = {
    "sigma": FlowSigma("sigma").mixture,
    "time": FlowSigma("time").mixture,
    **{k: partial(ANGLE.mixture, predicts=k) for k in ("epsilon", "v_prediction", "sample")},
}
every_mixture = pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- what latents and predictions are made of ---------------------------------------------------


@every_mixture
@pytest.mark.parametrize("level", [1.0, 0.9, 0.5, 0.02])
def test_latents_and_a_prediction_tell_what_is_clean_and_back(
    mixture: Callable[[float], Mixture], level: float
) -> None:
    clean, noise = random(3, seed=1), random(3, seed=2)
    found = mixture(level)
    latents = found.alpha * clean + found.sigma * noise
    prediction = found.of_clean * clean + found.of_noise * noise
    assert found.tells
    torch.testing.assert_close(found.clean(latents, prediction), clean)
    torch.testing.assert_close(found.prediction(latents, clean), prediction)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_a_diffusion_schedulers_own_clean_latents_are_these(predicts: str) -> None:
    """diffusers' DPM-Solver++ and DDIM say what a prediction means."""
    latents, prediction = random(1, 4, 8, 8, seed=1), random(1, 4, 8, 8, seed=2)
    made = {"beta_start": 0.0001, "beta_end": 0.02, "prediction_type": predicts}
    solver = DPMSolverMultistepScheduler(**made, algorithm_type="dpmsolver++")
    solver.set_timesteps(5)
    ddim = DDIMScheduler(**made, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(5)
    for step, timestep in zip(ANGLE.plan(solver), solver.timesteps, strict=True):
        solver._step_index = solver.index_for_timestep(timestep)
        wanted = solver.convert_model_output(prediction, sample=latents)
        found = ANGLE.mixture(step.noise_level, predicts).clean(latents, prediction)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for step, timestep in zip(ANGLE.plan(ddim), ddim.timesteps, strict=True):
        wanted = ddim.step(prediction, timestep, latents).pred_original_sample
        found = ANGLE.mixture(step.noise_level, predicts).clean(latents, prediction)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_flow_schedulers_last_step_ends_in_these() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    latents, velocity = random(1, 4, 8, 8, seed=1).float(), random(1, 4, 8, 8, seed=2).float()
    last = FlowSigma().plan(scheduler)[-1]
    scheduler.set_begin_index(2)
    wanted = scheduler.step(velocity, scheduler.timesteps[-1], latents).prev_sample
    found = FlowSigma().mixture(last.noise_level).clean(latents, velocity)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("level", [math.pi / 2, 0.0])
def test_where_nothing_can_be_told_the_prediction_itself_is_extrapolated(level: float) -> None:
    """Of noise alone none tells the picture, and of the picture alone none tells the noise."""
    forecaster = DataForecaster(mixture=partial(ANGLE.mixture, predicts="epsilon"))
    only = remembered(forecaster, (level or 0.5, random(1, 6, 4), random(1, 6, 4, seed=1)))
    found = forecaster.forecast(only, Streams(random(1, 6, 4, seed=2)), 0.4 if level else 0.0)
    assert torch.equal(found.hidden_states, only.anchors[0].residual.hidden_states)


# ---- the forecaster on plain tensors ------------------------------------------------------------


def remembered(
    forecaster: DataForecaster, *steps: tuple[float, torch.Tensor, torch.Tensor]
) -> Memory:
    """Return the memory of steps: noise level, latents and output as a contract holds them."""
    memory = Memory()
    for level, latents, output in steps:
        memory = forecaster.update(
            memory, Anchor(level, Streams(latents), Streams(output, output[:, :1]), None)
        )
    return memory


def noisy(mixture: Mixture, clean: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents with a noise of their own, and what a model that knows them predicts."""
    noise = random(*clean.shape, seed=seed)
    latents = mixture.alpha * clean + mixture.sigma * noise
    return latents, mixture.of_clean * clean + mixture.of_noise * noise


@every_mixture
@pytest.mark.parametrize("anchors", [1, 2])
def test_what_is_clean_and_stays_is_forecast_exactly_whatever_the_latents_are(
    mixture: Callable[[float], Mixture], anchors: int
) -> None:
    clean, forecaster = random(2, 6, 4), DataForecaster(mixture=mixture)
    levels = (0.9, 0.7)[:anchors]
    steps = [(level, *noisy(mixture(level), clean, i)) for i, level in enumerate(levels)]
    latents, wanted = noisy(mixture(0.3), clean, seed=9)
    found = forecaster.forecast(remembered(forecaster, *steps), Streams(latents), 0.3)
    torch.testing.assert_close(found.hidden_states, wanted, rtol=1e-5, atol=1e-5)


@every_mixture
def test_the_slope_of_what_is_clean_fades_by_its_share(mixture: Callable[[float], Mixture]) -> None:
    old, new = random(1, 6, 4, seed=1), random(1, 6, 4, seed=2)
    forecaster = DataForecaster(share=0.25, mixture=mixture)
    steps = [
        (level, *noisy(mixture(level), clean, i))
        for i, (level, clean) in enumerate(((0.8, old), (0.6, new)))
    ]
    # An anchors' distance ahead, and the integral of .25**s up to there.
    reach = 0.75 / -math.log(0.25)
    latents, wanted = noisy(mixture(0.4), new + reach * (new - old), seed=9)
    found = forecaster.forecast(remembered(forecaster, *steps), Streams(latents), 0.4)
    torch.testing.assert_close(found.hidden_states, wanted, rtol=1e-4, atol=1e-4)


def test_a_picture_that_is_put_out_with_its_variance_keeps_the_newest_of_that() -> None:
    mixture, clean = ANGLE.mixture, random(1, 4, 3, 2)
    contract, forecaster = ForwardContract(channels=4), DataForecaster(mixture=ANGLE.mixture)

    def computed(level: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        latents, prediction = noisy(mixture(level), clean, seed)
        whole = torch.cat((prediction, torch.full((1, 4, 3, 2), float(seed))), dim=1)
        return contract.read((latents,), {}).hidden_states, contract.unpack(whole).hidden_states

    memory = remembered(forecaster, (0.9, *computed(0.9, 1)))
    latents, wanted = computed(0.5, 2)
    found = contract.pack(forecaster.forecast(memory, Streams(latents), 0.5))
    wanted = contract.pack(Streams(wanted))[:, :4]
    torch.testing.assert_close(found[:, :4], wanted, rtol=1e-5, atol=1e-5)
    assert found[:, 4:].unique().tolist() == [1.0]


@pytest.mark.parametrize("axis", [1, 2])
def test_a_video_is_forecast_in_its_own_shape(axis: int) -> None:
    """With more channels than are noise, as image-to-video models are given."""
    contract = ForwardContract(ForwardLayout(channel_axis=axis), channels=4)
    forecaster, clean = DataForecaster(), random(1, 4, 3, 6, 2).movedim(1, axis)
    extra = random(1, 2, 3, 6, 2).movedim(1, axis)

    def computed(level: float, seed: int) -> tuple[Streams, torch.Tensor]:
        latents, prediction = noisy(FlowSigma().mixture(level), clean, seed)
        return contract.read((torch.cat((latents, extra), dim=axis),), {}), prediction

    inputs, prediction = computed(0.8, 1)
    held = contract.unpack((prediction,)).hidden_states
    memory = remembered(forecaster, (0.8, inputs.hidden_states, held))
    now, wanted = computed(0.3, 2)
    (found,) = contract.pack(forecaster.forecast(memory, now, 0.3))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_without_the_latents_a_stage_extrapolates_what_it_puts_out() -> None:
    old, new = random(1, 6, 4, seed=1), random(1, 6, 4, seed=2)
    forecaster = DataForecaster().on_model(FlowSigma().mixture, sees_latents=False)
    memory = remembered(forecaster, (0.8, old, old), (0.6, new, new))
    found = forecaster.forecast(memory, Streams(random(1, 6, 4, seed=3)), 0.4)
    reach = (1 - HANDED_ON) / -math.log(HANDED_ON)
    wanted = new + reach * (new - old)
    torch.testing.assert_close(found.hidden_states, wanted)
    torch.testing.assert_close(found.encoder_hidden_states, wanted[:, :1])


# ---- pipelines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["flux", "sd3", "pixart"])
def test_a_model_that_knows_the_picture_is_run_once(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the noise, the solver and the guidance, every other step is forecast exactly."""
    pipe, call = TINY_PIPELINES[model]()
    pipe.set_progress_bar_config(disable=True)
    call = {**call, "num_inference_steps": 6}
    transformer, ran = pipe.transformer, []
    adapter = adapter_of(transformer)
    layout = adapter.forward_layout()
    predicts = pipe.scheduler.config.get("prediction_type", "")

    def knowing(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        latents = layout.latents_of(args, kwargs)
        step = len(ran)
        ran.append(step)
        level = adapter.plan(pipe.scheduler)[pipe.scheduler.step_index or 0].noise_level
        mixture = adapter.noise.mixture(level, predicts)
        clean = torch.linspace(-1, 1, latents.numel()).view_as(latents).float()
        made = mixture.prediction(latents.float(), clean)
        if transformer.config.out_channels == 2 * latents.shape[1]:
            made = torch.cat((made, made), dim=1)
        return (made.to(latents.dtype),)

    monkeypatch.setattr(transformer, "forward", knowing)

    def generate() -> torch.Tensor:
        return pipe(**{**call, "generator": torch.Generator().manual_seed(3)}).images

    wanted, each = generate(), len(ran)
    apply_cache_on_transformer(transformer, forecaster="data", computed_steps=1)
    found = generate()
    assert len(ran) - each == each // 6
    assert hook_on(transformer) is not None
    assert get_cache_statistics(transformer)["forced_beyond_budget"] == 0
    remove_cache(transformer)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_schedulers_prediction_type_is_asked_when_it_is_needed() -> None:
    """Exchanged after the cache was applied, as pipelines allow."""
    pipe, call = TINY_PIPELINES["pixart"]()
    apply_cache_on_transformer(pipe.transformer, forecaster="data", computed_steps=2)
    engine = hook_on(pipe.transformer).engine
    for predicts in ("epsilon", "v_prediction"):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, prediction_type=predicts
        )
        pipe(**call)
        assert engine.forecaster.mixture(0.7) == PixArtAdapter.noise.mixture(0.7, predicts)
    remove_cache(pipe.transformer)

"""Whose scheduler plans the steps: found, given, exchanged, shared, run too early, or none."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from support.flux import STEPS, Flux
from support.loops import LEVELS, SCHEDULER, Branch, alone, begin, cached, denoise, flags_of, same
from support.stack import EVER
from support.turns import Pipeline

from xfuser_fastcache import (
    apply_cache_on_transformer,
    get_cache_statistics,
    get_cache_trace,
    remove_cache,
)
from xfuser_fastcache.clock.pipelines import PresentScheduler, owners_of, watch_pipelines

given_or_found = pytest.mark.parametrize("given", [True, False], ids=["given", "found"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def shifted(flux: Flux) -> FlowMatchEulerDiscreteScheduler:
    """Return another scheduler for the same pipeline, whose plans are others."""
    return FlowMatchEulerDiscreteScheduler.from_config(flux.pipe.scheduler.config, shift=3.0)


def noise_levels(flux: Flux) -> list[float]:
    return [row["noise_level"] for row in get_cache_trace(flux.transformer)]


# ---- exchanged ----------------------------------------------------------------------------------


@given_or_found
@pytest.mark.parametrize("ran", [0, 1], ids=["before any picture", "between two"])
def test_a_scheduler_that_is_exchanged_under_a_cache_plans_from_then_on(
    given: bool, ran: int
) -> None:
    fresh = Flux()
    fresh.pipe.scheduler = shifted(fresh)
    wanted = fresh.cache()()
    flux = Flux().cache(scheduler=given)
    for _ in range(ran):
        assert not torch.equal(flux(), wanted)
    flux.pipe.scheduler = shifted(flux)
    for _ in range(2):
        assert torch.equal(flux(), wanted)
        assert noise_levels(flux) == noise_levels(fresh) and flux.flags == fresh.flags
    assert get_cache_statistics(flux.transformer)["clock"] == "scheduler"


@given_or_found
def test_a_mask_is_for_the_steps_of_the_exchanged_scheduler(given: bool) -> None:
    mask = [1, 1, 0, 1, 0, 1]
    flux = Flux().cache(scheduler=given, steps_mask=mask)
    with pytest.raises(ValueError, match="steps_mask has 6 entries, .* has 8 steps"):
        flux()
    flux.pipe.scheduler = shifted(flux)
    flux(num_inference_steps=6)
    assert flux.flags == [1 - computed for computed in mask]


# ---- shared -------------------------------------------------------------------------------------


@given_or_found
def test_two_pipelines_with_one_transformer_each_go_by_their_own_plan(given: bool) -> None:
    counts = (STEPS, 5)

    def pipelines(flux: Flux) -> list[Any]:
        other = FluxPipeline(
            **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
            scheduler=shifted(flux),
            transformer=flux.transformer,
        )
        other.set_progress_bar_config(disable=True)
        return [flux.pipe, other]

    def draw(flux: Flux, pipe: Any, steps: int) -> torch.Tensor:
        noise = {"generator": torch.Generator().manual_seed(1)}
        return pipe(**{**flux.call, "num_inference_steps": steps, **noise}).images

    wanted, plans = [], []
    for index, steps in enumerate(counts):
        flux = Flux()
        pipe = pipelines(flux)[index]
        flux.cache(scheduler=False)
        wanted.append(draw(flux, pipe, steps))
        plans.append(noise_levels(flux))
    flux = Flux()
    both = pipelines(flux)
    flux.cache(scheduler=given)
    for index in (0, 1, 0, 0, 1, 1, 0):
        assert torch.equal(draw(flux, both[index], counts[index]), wanted[index])
        assert noise_levels(flux) == plans[index] and flux.flags[-1] == 0
    assert get_cache_statistics(flux.transformer)["generations"] == 7


def test_a_pipeline_that_is_interrupted_leaves_no_plan_behind_for_the_other() -> None:
    flux = Flux()
    other = FluxPipeline(**{**flux.pipe.components, "scheduler": shifted(flux)})
    other.set_progress_bar_config(disable=True)
    flux.cache(scheduler=False)
    wanted = flux()

    def interrupt(pipe: Any, index: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        pipe._interrupt = index == 2
        return {}

    other(**flux.call | {"num_inference_steps": 6}, callback_on_step_end=interrupt)
    assert len(flux.flags) == 3
    assert torch.equal(flux(), wanted)


# ---- pipelines are known, and not kept alive ----------------------------------------------------


def test_pipelines_of_before_and_after_are_known_and_let_go() -> None:
    before = Flux()
    watch_pipelines(), watch_pipelines()
    after = FluxPipeline(**before.pipe.components)
    transformer = before.transformer
    assert owners_of(transformer) == [before.pipe, after]
    after.transformer = Flux().transformer
    assert owners_of(transformer) == [before.pipe]
    del before
    gc.collect()
    assert owners_of(transformer) == []


def test_of_several_schedulers_the_one_that_planned_last_is_it() -> None:
    flux = Flux()
    first, second = flux.pipe.scheduler, shifted(flux)
    present = PresentScheduler(flux.transformer, given=second)
    watch_pipelines()
    assert present() is None  # what it was born with is no plan
    first.set_timesteps(3)
    assert [present() for _ in range(2)] == [first, first]
    second.set_timesteps(4)
    assert [present() for _ in range(2)] == [second, second]
    first.set_timesteps(3)
    assert present() is first
    # One that is exchanged is gone; of those that are left the one with a plan serves.
    flux.pipe.scheduler = shifted(flux)
    assert present() is second


def test_a_scheduler_that_never_ran_plans_nothing() -> None:
    """Applied before any generation, with a scheduler that is never used."""
    unused = FlowMatchEulerDiscreteScheduler()
    flux = Flux()
    apply_cache_on_transformer(flux.transformer, scheduler=unused, cache_ratio_threshold=EVER)
    wanted = Flux().cache()()
    assert torch.equal(flux(), wanted)
    assert get_cache_statistics(flux.transformer)["clock"] == "scheduler"


def test_a_pipeline_without_a_scheduler_plans_nothing() -> None:
    class Bare(DiffusionPipeline):
        def __init__(self, transformer: Any):
            super().__init__()
            self.register_modules(transformer=transformer)

    flux = Flux()
    bare = Bare(flux.transformer)
    assert bare in owners_of(flux.transformer)
    flux.cache(scheduler=False)()
    assert flux.flags[-1] == 0


# ---- none at all --------------------------------------------------------------------------------


def test_a_loop_without_any_scheduler_works_and_is_told_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transformer, branch = alone(), Branch(0)
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"):
        first = denoise(transformer, branch, scheduler=None)[0]
        assert same(denoise(transformer, branch, scheduler=None)[0], first)
    (record,) = caplog.records
    assert "no scheduler has planned" in record.message and "num_steps" in record.message
    found = get_cache_statistics(transformer)
    assert (found["clock"], found["generations"], found["steps"]) == ("timesteps", 2, 2 * STEPS)
    assert any(flags_of(transformer).values())


def test_a_loop_with_a_scheduler_of_its_own_is_followed_by_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It plans with the scheduler and steps by itself, so that the counter stands still."""
    transformer, branch = cached(), Branch(0)
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"):
        denoise(transformer, branch)
    assert get_cache_statistics(transformer)["clock"] == "plan" and not caplog.records
    assert flags_of(transformer)[STEPS - 1] == 0


# ---- a warm-up of one step ----------------------------------------------------------------------


# PixArt-alpha takes one step for its distilled form, which needs a scheduler of its own.
@pytest.mark.parametrize("model", ["flux", "sd3", "pixart-sigma"])
@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
def test_a_warm_up_of_one_step_leaves_the_next_picture_as_a_fresh_one(
    model: str, given: bool
) -> None:
    def cached_pipe() -> Pipeline:
        pipe = Pipeline(model)
        plan = pipe.pipe.scheduler if given else None
        apply_cache_on_transformer(pipe.transformer, scheduler=plan, cache_ratio_threshold=EVER)
        return pipe

    fresh, warmed = cached_pipe(), cached_pipe()
    wanted = fresh()
    warmed(num_inference_steps=1, generator=torch.Generator().manual_seed(9))
    assert torch.equal(warmed(), wanted)
    found, expected = (get_cache_trace(pipe.transformer) for pipe in (warmed, fresh))
    assert [row["decision"] for row in found] == [row["decision"] for row in expected]
    assert get_cache_statistics(warmed.transformer)["generations"] == 2


@pytest.mark.parametrize("named", [False, True], ids=["by order", "by name"])
@pytest.mark.parametrize("options", [{}, {"num_steps": STEPS}, {"forecaster": "output"}], ids=str)
def test_a_warm_up_of_one_step_in_a_bare_loop_does_so_too(
    named: bool, options: dict[str, Any]
) -> None:
    """No pipeline, no scheduler: one step at the first level, and then all of them."""
    branch, other = Branch(0), Branch(5)
    other.name = branch.name
    wanted = denoise(alone(**options), branch, named=named, scheduler=None)[0]
    transformer = alone(**options)
    begin(other, scheduler=None)
    other.step(transformer, LEVELS[0], named=named)
    assert same(denoise(transformer, branch, named=named, scheduler=None)[0], wanted)
    assert get_cache_statistics(transformer)["generations"] == 2


def test_a_plan_of_one_step_in_a_loop_of_ones_own_is_a_generation() -> None:
    branch = Branch(0)
    wanted = denoise(cached(), branch)[0]
    transformer = cached()
    SCHEDULER.set_timesteps(sigmas=LEVELS[:1])
    branch.start()
    branch.step(transformer, LEVELS[0], named=False)
    assert same(denoise(transformer, branch)[0], wanted)
    remove_cache(transformer)

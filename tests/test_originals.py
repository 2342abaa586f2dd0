"""The originals of the backends, run beside ours: the same branch at every step, the same forecast.

One process. Each original runs its own code on the same tiny pipeline and the same noise. Where an
original does not keep its own rule, a test shows it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheConfig, apply_mag_cache
from diffusers.hooks.taylorseer_cache import (
    TaylorSeerCacheConfig,
    TaylorSeerState,
    apply_taylorseer_cache,
)
from support.original_runs import STEPS, Generator
from support.worlds import run_world

from xfuser_fastcache.forecasters.taylor import SecondOrderTaylorForecaster, TaylorForecaster
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory


def fb_threshold(found: Generator, rank: int) -> float:
    """Return a threshold between two changes that occur, so that rounding decides nothing."""
    with found.ours(use_cache="Fb", cache_ratio_threshold=0):
        found()
        changes = sorted(x for x in found.statistics() if x is not None)
    return (changes[rank] + changes[rank + 1]) / 2


@pytest.mark.parametrize("model", ["flux", "pixart"])
@pytest.mark.parametrize("rank", [2, 5, 9])
def test_fb_takes_the_same_branch_as_diffusers_first_block_cache(model: str, rank: int) -> None:
    found = Generator(model)
    threshold = fb_threshold(found, rank)
    with found.ours(use_cache="Fb", cache_ratio_threshold=threshold):
        cached = found()
        mine = found.computed
    assert 1 < len(mine) < STEPS
    with found.diffusers(apply_first_block_cache, FirstBlockCacheConfig(threshold=threshold)):
        theirs = found()
    assert mine == found.computed
    torch.testing.assert_close(cached, theirs, rtol=1e-4, atol=1e-5)


def test_diffusers_first_block_cache_does_not_run_sd3_and_ours_does() -> None:
    """The last block of SD3 returns no text, of which the original wants the residual."""
    found = Generator("sd3")
    threshold = fb_threshold(found, 5)
    with found.ours(use_cache="Fb", cache_ratio_threshold=threshold):
        assert found().isfinite().all()
    assert 1 < len(found.computed) < STEPS
    with found.diffusers(apply_first_block_cache, FirstBlockCacheConfig(threshold=threshold)):
        with pytest.raises(TypeError, match="NoneType"):
            found()


@pytest.mark.parametrize("model", ["flux", "pixart"])
@pytest.mark.parametrize(
    ("threshold", "skips", "retention"), [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.05, 2, 0.3)]
)
def test_mag_takes_the_same_branch_as_diffusers_mag_cache(
    model: str, threshold: float, skips: int, retention: float
) -> None:
    """Its ratios are stretched to another number of steps; it never knows the last step."""
    found = Generator(model)
    warm_up = int(retention * STEPS + 0.5)
    options: dict[str, Any] = {"cache_ratio_threshold": threshold, "num_warmup_steps": warm_up}
    with found.ours(scheduler=True, use_cache="Mag", max_consecutive_skips=skips, **options):
        cached = found()
        mine = found.computed
    config = MagCacheConfig(threshold, skips, retention, STEPS, FLUX_MAG_RATIOS)
    with found.diffusers(apply_mag_cache, config):
        theirs = found()
    assert warm_up < len(mine) < STEPS
    assert mine == sorted({*found.computed, STEPS - 1})
    if STEPS - 1 in found.computed:
        torch.testing.assert_close(cached, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def xdit() -> dict[str, Any]:
    return run_world("originals_worker.py", 1)[0]


@pytest.mark.gloo
def test_tea_takes_the_same_branch_as_xdits_teacache(xdit: dict[str, Any]) -> None:
    assert len({tuple(run["ours"]) for run in xdit["tea"].values()}) == len(xdit["tea"])
    for run in xdit["tea"].values():
        assert run["ours"] == run["theirs"]
        assert len(run["ours"]) < STEPS


@pytest.mark.gloo
def test_xdits_teacache_counts_steps_from_its_second_call_on(xdit: dict[str, Any]) -> None:
    """Told the number of steps, it computes the second one, and not the last for being the last."""
    for run in xdit["tea"].values():
        found = run["theirs_told_all_steps"]
        assert found[:2] == [0, 1]
        assert [step for step in found if step < STEPS - 1] == run["ours"][:-1]
    assert any(STEPS - 1 not in run["theirs_told_all_steps"] for run in xdit["tea"].values())


@pytest.mark.gloo
def test_xdits_fbcache_takes_its_reference_by_the_decision_before(xdit: dict[str, Any]) -> None:
    """Its rule is the last computed step; its reference is renewed one step after each of those."""
    for run in xdit["fb"].values():
        after = [0, *(step + 1 for step in run["theirs"] if step + 1 < STEPS)]
        assert run["renewed"] == sorted(set(after))
        assert run["renewed"] != run["theirs"]
    assert any(run["ours"] != run["theirs"] for run in xdit["fb"].values())


# ---- TaylorSeer: forecasts over steps that are evenly spaced in noise, as its own are ------------


@pytest.mark.parametrize("interval", [2, 4])
def test_taylorseer_forecasts_as_diffusers_with_factors_in_float32(interval: int) -> None:
    """The original's lite variant forecasts the last projection, as `output` does."""
    found = Generator("flux")
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=3,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    with found.diffusers(apply_taylorseer_cache, config):
        theirs = found()
    # It computes the step after the first one that it forecasts, whatever the interval.
    computed = [0, 1, 2, *range(4, STEPS, interval)]
    mask = [int(step in computed) for step in range(STEPS)]
    found = Generator("flux")
    uncached = found()
    with found.ours(scheduler=True, use_cache="TaylorSeer", forecaster="output", steps_mask=mask):
        mine = found()
        assert found.computed == computed
    assert (mine - theirs).abs().max() < 1e-5 < 1e-4 < (mine - uncached).abs().max()


def test_taylorseer_keeps_its_interval_after_the_warm_up() -> None:
    found = Generator("flux")
    with found.ours(scheduler=True, use_cache="TaylorSeer", cache_interval=4):
        found()
    assert found.computed == [0, 1, 2, 6, 10, 14, 15]


def anchors(values: list[float], depth: int) -> Memory:
    """Return a memory of residuals at steps 0, 1, 2, ..., newest first, a noise level a step."""

    def stream(value: float) -> Streams:
        return Streams(torch.full((1, 2, 2), value))

    found = [Anchor(float(i), stream(0.0), stream(x), None) for i, x in enumerate(values)]
    return Memory(anchors=tuple(found[::-1][:depth]))


@pytest.mark.parametrize(
    ("order", "forecaster", "theirs", "mine"),
    [(1, TaylorForecaster(), 16.0, 16.0), (2, SecondOrderTaylorForecaster(), 32.0, 36.0)],
)
def test_diffusers_order_2_is_not_exact_on_quadratics_and_ours_is(
    order: int, forecaster: TaylorForecaster, theirs: float, mine: float
) -> None:
    """The square of the step, known at steps 0, 1 and 2, forecast for step 6."""
    state = TaylorSeerState(torch.float32, order)
    for step in range(3):
        state.current_step = step
        state.update((torch.tensor([float(step**2)]),))
    state.current_step = 6
    assert state.predict()[0].item() == theirs
    memory = anchors([0.0, 1.0, 4.0], depth=forecaster.depth)
    found = forecaster.forecast(memory, Streams(torch.zeros(1, 2, 2)), 6.0)
    assert found.hidden_states.unique().tolist() == [mine]

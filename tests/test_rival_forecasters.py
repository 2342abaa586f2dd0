"""Forecasters after other caches: what each is exact on, and its published formula, by scalars.

The formulas are written out here from the papers and the codes that the docstrings name, over even
steps as there; `tests/test_forecasters.py` has what every forecaster promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import cos, exp, factorial, pi, sqrt

import numpy as np
import pytest
import torch
from scipy.special import eval_hermite
from support.flux import Flux
from test_forecasters import BATCH, TOKENS, anchor, assert_close, moved, remember, streams

from xfuser_fastcache.backends import FORECASTERS
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.forecasters.dmd import DMDForecaster
from xfuser_fastcache.forecasters.foca import FoCaForecaster
from xfuser_fastcache.forecasters.hicache import HiCacheForecaster
from xfuser_fastcache.forecasters.meancache import MeanCacheForecaster
from xfuser_fastcache.forecasters.spectrum import SpectrumForecaster
from xfuser_fastcache.forecasters.taylor import TaylorForecaster
from xfuser_fastcache.models.streams import Streams

RIVALS = ("hicache", "foca", "dmd", "spectrum", "meancache")
every_rival = pytest.mark.parametrize("name", RIVALS)
# Newest last, as computed; a shifted schedule's unevenness.
UNEVEN = (1.0, 0.96, 0.9, 0.82, 0.7, 0.55, 0.35)
EVEN = tuple(1.0 - 0.1 * i for i in range(7))
PARTS = [streams(seed) for seed in (1, 2, 3, 4, 5)]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def mixed(*factors: float) -> Streams:
    """Return random tensors, weighted."""
    first, *others = PARTS[: len(factors)]
    return first.map(
        lambda *parts: sum(f * part for f, part in zip(factors, parts, strict=True)), *others
    )


def run(
    made: Forecaster,
    levels: Sequence[float],
    residual: Callable[[float], Streams],
    now: float,
) -> tuple[Streams, Callable[[Streams], Streams]]:
    """Return a forecast, and what makes a wanted residual comparable to it."""
    memory = remember(made, *(anchor(s, streams(i), residual(s)) for i, s in enumerate(levels)))
    inputs = streams(50)
    found = made.forecast(memory, inputs, now)
    return found, lambda held: moved(type(made), inputs, held)


# ---- exact on -----------------------------------------------------------------------------------

LINE = (lambda s: 1.0, lambda s: s)
QUARTIC = tuple((lambda s, k=k: s**k) for k in range(5))
# Fading to a constant; fading and growing; turning while it fades.
FADING = (lambda s: 1.0, lambda s: exp(3 * s))
APART = (lambda s: exp(-2 * s), lambda s: exp(2 * s))
TURNING = (lambda s: exp(s) * cos(5 * s), lambda s: exp(s) * cos(5 * s + pi / 2))
EXACT = {
    "hicache at half of the squared scale, a line": (
        HiCacheForecaster(scale=sqrt(0.5)),
        UNEVEN[:2],
        LINE,
    ),
    "foca, a line": (FoCaForecaster(), UNEVEN, LINE),
    "foca of two anchors, a line": (FoCaForecaster(), UNEVEN[:2], LINE),
    "spectrum without a ridge, a quartic": (
        SpectrumForecaster(ridge=1e-13, share=1.0),
        UNEVEN,
        QUARTIC,
    ),
    "spectrum's local share, a line": (SpectrumForecaster(share=0.0), UNEVEN, LINE),
    "dmd, a constant and an exponential": (DMDForecaster(), EVEN, FADING),
    "dmd, two exponentials": (DMDForecaster(), EVEN, APART),
    "dmd, four exponentials": (DMDForecaster(), EVEN, (*FADING, *TURNING)),
    "dmd of four anchors, two exponentials": (DMDForecaster(), EVEN[:4], APART),
    "dmd, an oscillation": (DMDForecaster(), EVEN, TURNING),
}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("ahead", [0.02, 0.07, 0.1, 0.13])
def test_each_is_exact_on_what_it_claims(case: str, ahead: float) -> None:
    made, levels, functions = EXACT[case]

    def residual(level: float) -> Streams:
        return mixed(*(function(level) for function in functions))

    now = levels[-1] - ahead
    found, comparable = run(made, levels, residual, now)
    wanted = comparable(residual(now))
    # A ridge keeps the poles from being found to the last digit.
    off = 1e-6 if "dmd" not in case else 5e-3 if "four exponentials" in case else 2e-4
    close = {"rtol": off, "atol": off}
    for name in ("hidden_states", "encoder_hidden_states"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), **close)


@pytest.mark.parametrize("made", [FoCaForecaster(), SpectrumForecaster()])
def test_what_is_exact_on_these_is_not_exact_on_a_parabola(made: Forecaster) -> None:
    """Else the cases above would show nothing."""

    def residual(level: float) -> Streams:
        return mixed(1.0, level, level**2)

    found, comparable = run(made, EVEN, residual, 0.3)
    off = found.hidden_states - comparable(residual(0.3)).hidden_states
    assert off.abs().max() > 1e-3


def test_each_picture_of_a_batch_has_poles_of_its_own() -> None:
    """And its text others than its image."""

    def residual(level: float) -> Streams:
        image, text = PARTS[0].hidden_states, PARTS[0].encoder_hidden_states
        rates = torch.tensor([-2.0, 3.0], dtype=torch.float64).view(-1, 1, 1)
        assert text is not None
        return Streams(image * (rates * level).exp(), text * (2 * rates * level).exp())

    found, comparable = run(DMDForecaster(), EVEN, residual, 0.33)
    wanted = comparable(residual(0.33))
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.encoder_hidden_states, wanted.encoder_hidden_states, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("ahead", [0.05, 0.2])
def test_meancache_is_the_average_from_the_anchor_on_where_velocity_is_linear(ahead: float) -> None:
    def velocity(level: float) -> Streams:
        return mixed(1.0, level)

    start, end = UNEVEN[-1], UNEVEN[-1] - ahead
    found, comparable = run(MeanCacheForecaster(), UNEVEN, velocity, end)
    between = np.linspace(start, end, 1001)
    assert_close(found, comparable(mixed(1.0, float(np.trapezoid(between, between) / -ahead))))


# ---- the published formulas, by scalars ---------------------------------------------------------

VALUES = (0.3, 1.1, 0.7, 1.9, 1.2, 2.4, 1.0)  # Of no class that any of them is exact on.


def scalar(made: Forecaster, levels: Sequence[float], values: Sequence[float], now: float) -> float:
    """Return what is forecast of numbers."""
    held = dict(zip(levels, values, strict=True))
    found, comparable = run(made, levels, lambda level: mixed(held[level]), now)
    ratio = found.map(torch.sub, comparable(mixed(0.0))).hidden_states / PARTS[0].hidden_states
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))
    return float(ratio.flatten()[0])


@pytest.mark.parametrize("interval", [3, 5, 7])
@pytest.mark.parametrize("scale", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("anchors", [2, 3])
def test_hicache_by_its_ladder_of_differences(anchors: int, scale: float, interval: int) -> None:
    levels, values = EVEN[:anchors], VALUES[:anchors]
    rungs = list(values)
    differences = [values[-1]]
    while len(rungs) > 1:
        rungs = [(after - before) / interval for before, after in pairwise(rungs)]
        differences.append(rungs[-1])
    for step in range(1, interval):
        wanted = differences[0] + sum(
            scale**k * eval_hermite(k, scale * step) / factorial(k) * differences[k]
            for k in range(1, anchors)
        )
        now = levels[-1] - 0.1 * step / interval
        found = scalar(HiCacheForecaster(scale=scale, interval=interval), levels, values, now)
        assert found == pytest.approx(wanted, rel=1e-6)


def test_foca_by_its_equations_six_to_eight() -> None:
    before, last, newest = VALUES[:3]
    h = -0.1
    slope = (3 * newest - 4 * last + before) / (2 * h)  # 6, at the newest
    predicted = 4 / 3 * newest - 1 / 3 * last + 2 * h / 3 * slope  # 7
    wanted = newest + h / 2 * (slope + (predicted - newest) / h)  # 8
    found = scalar(FoCaForecaster(), EVEN[:3], VALUES[:3], EVEN[2] + h)
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("degree", "ridge", "share"), [(4, 0.1, 0.5), (2, 0.5, 1.0), (3, 1, 0.2)])
def test_spectrum_by_a_least_squares_of_cosines(degree: int, ridge: float, share: float) -> None:
    def row(level: float) -> list[float]:
        return [cos(k * np.arccos(2 * level - 1)) for k in range(degree + 1)]

    # The ridge as rows of its own.
    design = np.vstack([[row(level) for level in UNEVEN], sqrt(ridge) * np.eye(degree + 1)])
    coefficients = np.linalg.lstsq(design, [*VALUES, *[0.0] * (degree + 1)], rcond=None)[0]
    now = 0.2
    local = VALUES[-1] + (VALUES[-1] - VALUES[-2]) * (now - UNEVEN[-1]) / (UNEVEN[-1] - UNEVEN[-2])
    wanted = share * np.dot(row(now), coefficients) + (1 - share) * local
    made = SpectrumForecaster(degree=degree, ridge=ridge, share=share)
    assert scalar(made, UNEVEN, VALUES, now) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("anchors", [4, 5, 6])
@pytest.mark.parametrize("horizon", [0.25, 0.5, 1.0, 1.3])
def test_dmd_by_modes_of_a_singular_value_decomposition(horizon: float, anchors: int) -> None:
    """cache-dit's way, on snapshots of no class at all: powers of the propagator's modes."""
    bends = [streams(90 + i) for i in range(anchors)]
    levels = EVEN[:anchors]

    def residual(level: float) -> Streams:
        parts = mixed(1.0, exp(level), cos(9 * level))
        return parts.map(lambda x, e: x + 0.1 * e, bends[levels.index(level)])

    found, comparable = run(DMDForecaster(), levels, residual, levels[-1] - 0.1 * horizon)
    held = found.map(torch.sub, comparable(mixed(0.0))).hidden_states.flatten(1)
    kept = [residual(level).hidden_states.flatten(1).numpy() for level in levels]
    for item in range(BATCH):
        snapshots = np.stack([each[item] for each in kept], axis=1)
        u, s, vh = np.linalg.svd(snapshots[:, :-1], full_matrices=False)
        assert s[-1] > 1e-2 * s[0]
        poles, vectors = np.linalg.eig(u.T @ snapshots[:, 1:] @ vh.T / s)
        modes = snapshots[:, 1:] @ vh.T / s @ vectors
        amounts = np.linalg.lstsq(modes, snapshots[:, -1].astype(complex), rcond=None)[0]
        wanted = (modes @ (poles.astype(complex) ** horizon * amounts)).real
        np.testing.assert_allclose(held[item].numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_meancache_by_what_the_average_was_off_by() -> None:
    before, newest = VALUES[:2]
    average = (before + newest) / 2
    off = (before - average) / (EVEN[1] - EVEN[0])
    for now in (0.85, 0.7):
        wanted = newest - off * (now - EVEN[1])
        found = scalar(MeanCacheForecaster(), EVEN[:2], VALUES[:2], now)
        assert found == pytest.approx(wanted, rel=1e-6)


# ---- where there is too little to go by ---------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "levels"),
    [
        (FoCaForecaster(), UNEVEN[:2]),
        (SpectrumForecaster(), UNEVEN[:3]),
        (SpectrumForecaster(degree=2), UNEVEN[:2]),
        (DMDForecaster(), EVEN[:3]),
        # One gap is three times as wide as the others.
        (DMDForecaster(), (1.0, 0.9, 0.6, 0.5)),
        (DMDForecaster(), (1.0, 0.9, 0.8, 0.5)),
        # A noise level comes again.
        (FoCaForecaster(), (1.0, 1.0, 0.8)),
        (DMDForecaster(), (1.0, 0.9, 0.9, 0.8, 0.7)),
        (SpectrumForecaster(), (1.0, 0.9, 0.9, 0.8, 0.7)),
    ],
)
def test_with_too_few_anchors_it_is_taylor(made: Forecaster, levels: Sequence[float]) -> None:
    values = dict(zip(levels, VALUES, strict=False))

    def residual(level: float) -> Streams:
        return mixed(values[level], 1.0, level)

    assert_close(*(run(each, levels, residual, 0.3)[0] for each in (made, TaylorForecaster())))


@pytest.mark.parametrize("anchors", [2, 7, 12])
@every_rival
def test_a_constant_residual_is_forecast_again(name: str, anchors: int) -> None:
    levels = [1.0 - 0.05 * i for i in range(anchors)]
    made = FORECASTERS[name]()
    if name == "spectrum":
        made = replace(made, ridge=1e-9)  # which shrinks all, what is constant too
    found, comparable = run(made, levels, lambda _: mixed(1.0), levels[-1] - 0.03)
    wanted = comparable(mixed(1.0)).hidden_states
    torch.testing.assert_close(found.hidden_states, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize(
    "levels",
    [
        (0.5,) * 9,
        (0.9, 0.5, 0.5, 0.5),
        (0.5, 0.5, 0.4, 0.4),
        (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4),
        (0.0, 0.0),
        # A plan that runs up again.
        (0.9, 0.7, 0.5, 0.7),
        (0.1, 0.3, 0.5, 0.7, 0.9),
    ],
)
@pytest.mark.parametrize("now", [0.5, 0.4, 0.0])
@every_rival
def test_noise_levels_that_come_again_never_make_nan(
    name: str, now: float, levels: Sequence[float], value: float
) -> None:
    found, _ = run(FORECASTERS[name](), levels, lambda level: mixed(value, level * value), now)
    assert found.hidden_states.isfinite().all()


def test_a_residual_that_flips_its_sign_keeps_dmd_finite() -> None:
    """A pole below zero has complex powers; their real part is taken."""
    sign = {level: (-1.0) ** i for i, level in enumerate(EVEN)}
    found, comparable = run(DMDForecaster(), EVEN, lambda s: mixed(sign[s]), EVEN[-1] - 0.05)
    held = found.map(torch.sub, comparable(mixed(0.0))).hidden_states
    assert held.abs().max() <= PARTS[0].hidden_states.abs().max() * 1.01


# ---- where tokens, patches and dtypes differ ----------------------------------------------------


@every_rival
@pytest.mark.parametrize("newest_mixed", [True, False])
def test_tokens_that_were_computed_at_different_steps(name: str, newest_mixed: bool) -> None:
    """Each goes by its own two steps, with no more than the first order."""
    made = FORECASTERS[name]()
    anchors = []
    for i, level in enumerate(EVEN[:5]):
        parts = [streams(seed + i, dtype=torch.float32) for seed in (1, 31)]
        levels = torch.full((BATCH, TOKENS, 1), level)
        levels[:, ::2] = level + 0.05
        last = i == 4 if newest_mixed else i == 3
        anchors.append(replace(anchor(level, *parts), levels=levels if last else None))
    inputs = streams(50, dtype=torch.float32)
    found = made.forecast(remember(made, *anchors), inputs, 0.5)
    plain = TaylorForecaster().forecast(remember(TaylorForecaster(), *anchors), inputs, 0.5)
    share = {"hicache": 0.5, "meancache": 0.5}.get(name, 1.0)
    start = anchors[-1].residual.map(torch.add, inputs)
    wanted = start.map(lambda x, ahead: x + share * (ahead - x), plain)
    if made.whole_forward:
        wanted = wanted.map(torch.sub, inputs)
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=1e-4, atol=1e-4)


@every_rival
def test_patches_go_on_with_what_was_fitted_to_all(name: str) -> None:
    made = FORECASTERS[name]()
    memory = remember(made, *(anchor(s, streams(i), streams(i + 9)) for i, s in enumerate(EVEN)))
    inputs = streams(50)
    whole = made.forecast(memory, inputs, 0.35)
    parts = zip(memory.split((2, 4)), inputs.split((2, 4)), strict=True)
    found = [made.forecast(part, now, 0.35).hidden_states for part, now in parts]
    torch.testing.assert_close(torch.cat(found, dim=1), whole.hidden_states)


@every_rival
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(name: str, dtype: torch.dtype) -> None:
    made = FORECASTERS[name]()
    parts = [(streams(i, dtype=dtype), streams(i + 9, dtype=dtype)) for i in range(len(EVEN))]

    def forecast(wide: torch.dtype) -> Streams:
        def to(x: Streams) -> Streams:
            return x.map(lambda t: t.to(wide))

        held = [anchor(s, to(x), to(r)) for s, (x, r) in zip(EVEN, parts, strict=True)]
        return made.forecast(remember(made, *held), to(streams(50, dtype=dtype)), 0.35)

    found, wanted = forecast(dtype).hidden_states, forecast(torch.float64).hidden_states
    assert found.dtype is dtype
    # The residual and its sum with the input.
    torch.testing.assert_close(found.double(), wanted, rtol=0.0, atol=20 * torch.finfo(dtype).eps)


@every_rival
def test_a_memory_holds_no_more_than_the_options_say(name: str) -> None:
    depths = {"hicache": 3, "foca": 3, "dmd": 6, "spectrum": 10, "meancache": 2}
    made = FORECASTERS[name]()
    levels = [1.0 - 0.05 * i for i in range(12)]
    memory = remember(made, *(anchor(s, streams(1), streams(2)) for s in levels))
    assert (made.depth, len(memory.anchors)) == (depths[name],) * 2
    assert DMDForecaster(history=4).depth == 4 and SpectrumForecaster(degree=2).depth == 8


# ---- on a pipeline ------------------------------------------------------------------------------


@every_rival
def test_each_runs_on_a_pipeline_and_repeats(name: str) -> None:
    steps, computed = 22, 8
    flux = Flux()
    uncached = flux(num_inference_steps=steps)
    found = flux.cache(computed_steps=computed, forecaster=name)(num_inference_steps=steps)
    assert flux.flags.count(0) == computed
    assert found.isfinite().all() and not torch.equal(found, uncached)
    assert torch.equal(flux(num_inference_steps=steps), found)


def test_all_of_them_draw_differently() -> None:
    """None falls back to another's forecast where there is enough to go by."""
    steps, drawn = 22, {}
    for name in (*RIVALS, "taylor", "output", "reuse"):
        flux = Flux().cache(computed_steps=8, forecaster=name)
        drawn[name] = flux(num_inference_steps=steps).numpy().tobytes()
    assert len(set(drawn.values())) == len(drawn)

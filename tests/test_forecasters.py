"""Forecasters are exact on what they claim, for image and text, in the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.integrate import quad

from xfuser_fastcache import CacheConfig
from xfuser_fastcache.artifacts.linear_map import ONLINE_RIDGE
from xfuser_fastcache.backends import FORECASTERS, forecaster_of
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.forecasters.data import DataForecaster
from xfuser_fastcache.forecasters.linear import LinearForecaster
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.forecasters.reuse import ReuseForecaster
from xfuser_fastcache.forecasters.taylor import DampedTaylorForecaster, TaylorForecaster
from xfuser_fastcache.measurements.moments import Reference
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory

BATCH, TOKENS, TEXT_TOKENS, DIM = 2, 6, 3, 4
both_streams = pytest.mark.parametrize("text", [True, False], ids=["image and text", "image"])
every_forecaster = pytest.mark.parametrize("make", FORECASTERS.values(), ids=FORECASTERS)


def streams(seed: int, text: bool = True, dtype: torch.dtype = torch.float64) -> Streams:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(BATCH, TOKENS, DIM, generator=generator, dtype=torch.float64)
    words = torch.randn(BATCH, TEXT_TOKENS, DIM, generator=generator, dtype=torch.float64)
    return Streams(image.to(dtype), words.to(dtype) if text else None)


def anchor(noise_level: float, inputs: Streams, residual: Streams) -> Anchor:
    return Anchor(noise_level, inputs, residual, Reference.of(inputs.hidden_states))


def remember(forecaster: Forecaster, *anchors: Anchor) -> Memory:
    """Return the memory of steps computed in this order."""
    memory = Memory()
    for computed in anchors:
        memory = forecaster.update(memory, computed)
    return memory


def moved(make: type[Forecaster], now: Streams, held: Streams) -> Streams:
    """Return what `make` forecasts where it expects `held` of its anchors.

    That is a residual, which moves the input; or the output itself.
    """
    return held if make.whole_forward else now.map(torch.add, held)


def assert_close(found: Streams, wanted: Streams) -> None:
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states)
    torch.testing.assert_close(found.encoder_hidden_states, wanted.encoder_hidden_states)


@both_streams
def test_reuse_is_exact_on_a_constant_residual(text: bool) -> None:
    residual = streams(1, text)
    memory = remember(
        ReuseForecaster(), *(anchor(s, streams(i, text), residual) for i, s in enumerate((1, 0.9)))
    )
    now = streams(5, text)
    assert_close(ReuseForecaster().forecast(memory, now, 0.1), now.map(torch.add, residual))


@both_streams
@pytest.mark.parametrize("make", [TaylorForecaster, OutputForecaster])
@pytest.mark.parametrize("sigmas", [(1.0, 0.9), (0.97, 0.42), (1.0, 0.8, 0.79)])
@pytest.mark.parametrize("sigma", [0.4, 0.15, 0.0])
def test_taylor_and_output_are_exact_on_what_is_linear_in_sigma_unevenly_spaced(
    make: type[Forecaster], sigmas: tuple[float, ...], sigma: float, text: bool
) -> None:
    constant, slope = streams(1, text), streams(2, text)

    def residual(level: float) -> Streams:
        return constant.map(lambda c, s: c + level * s, slope)

    memory = remember(
        make(),
        *(anchor(s, streams(int(100 * s), text), residual(s)) for s in sigmas),
    )
    now = streams(5, text)
    assert_close(make().forecast(memory, now, sigma), moved(make, now, residual(sigma)))


@both_streams
@pytest.mark.parametrize("sigma", [0.59, 0.5, 0.3, 0.0])
def test_the_damped_slope_fades_by_its_share_an_anchors_distance(sigma: float, text: bool) -> None:
    """Against the integral of a slope that falls exponentially from the last two anchors' on."""
    old, new = (anchor(s, streams(i, text), streams(i + 5, text)) for i, s in enumerate((0.8, 0.6)))
    reach, _ = quad(lambda distance: DampedTaylorForecaster.share**distance, 0, (0.6 - sigma) / 0.2)
    memory, now = remember(DampedTaylorForecaster(), old, new), streams(9, text)
    ahead = new.residual.map(lambda r0, r1: r0 + reach * (r0 - r1), old.residual)
    found = DampedTaylorForecaster().forecast(memory, now, sigma)
    assert_close(found, now.map(torch.add, ahead))


def test_each_token_is_damped_by_its_own_distance() -> None:
    """No two tokens need have the same two anchors; each is forecast as it would be alone."""
    levels = [torch.linspace(0.5, 0.6, TOKENS), torch.linspace(0.9, 0.7, TOKENS)]
    parts = [streams(seed, text=False, dtype=torch.float32) for seed in range(5)]
    each = [level.view(1, -1, 1).expand(BATCH, -1, 1) for level in levels]
    anchors = [
        Anchor(0.5, x, r, Reference.of(x.hidden_states), level)
        for x, r, level in zip(parts[:2], parts[2:4], each, strict=True)
    ]
    together = DampedTaylorForecaster().forecast(Memory(tuple(anchors)), parts[4], 0.2)
    for token in range(TOKENS):
        one = slice(token, token + 1)
        alone = tuple(
            anchor(float(level[token]), *(Streams(s.hidden_states[:, one]) for s in of))
            for of, level in zip(zip(parts[:2], parts[2:4], strict=True), levels, strict=True)
        )
        now = Streams(parts[4].hidden_states[:, one])
        wanted = DampedTaylorForecaster().forecast(Memory(alone), now, 0.2).hidden_states
        torch.testing.assert_close(together.hidden_states[:, one], wanted)


@both_streams
@pytest.mark.parametrize("name", ["taylor", "taylor2", "linear_taylor"])
def test_each_token_is_extrapolated_from_the_steps_at_which_it_was_computed(
    name: str, text: bool
) -> None:
    """Input and residual are linear in sigma; no two tokens need have the same two anchors."""
    parts = [streams(seed, text, torch.float32) for seed in range(4)]
    choose = torch.Generator().manual_seed(9)

    def at(constant: Streams, slope: Streams, levels: torch.Tensor, level: float) -> Streams:
        image = constant.hidden_states + levels * slope.hidden_states
        return Streams(image, constant.map(lambda c, s: c + level * s, slope).encoder_hidden_states)

    def computed(level: float, *choices: float) -> Anchor:
        index = torch.randint(len(choices), (BATCH, TOKENS, 1), generator=choose)
        levels = torch.tensor(choices)[index]
        inputs, residual = (at(*pair, levels, level) for pair in (parts[:2], parts[2:]))
        return Anchor(level, inputs, residual, Reference.of(inputs.hidden_states), levels)

    newest, before = computed(0.5, 0.5, 0.6), computed(0.7, 0.7, 0.8, 0.95)
    slope = Streams(torch.full((DIM,), 0.3), torch.full((DIM,), -0.2) if text else None)
    memory = Memory((newest, before, computed(1.0, 1.0)), slope)
    everywhere = torch.full((BATCH, TOKENS, 1), 0.2)
    now, residual = (at(*pair, everywhere, 0.2) for pair in (parts[:2], parts[2:]))
    wanted = now.map(torch.add, residual)
    found = FORECASTERS[name]().forecast(memory, now, 0.2)
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=1e-4, atol=1e-4)
    if text:
        torch.testing.assert_close(
            found.encoder_hidden_states, wanted.encoder_hidden_states, rtol=1e-4, atol=1e-4
        )
    again = FORECASTERS[name]().forecast(Memory((newest, newest), slope), now, 0.2)
    assert again.hidden_states.isfinite().all()


@pytest.mark.parametrize("make", [TaylorForecaster, OutputForecaster])
def test_over_two_anchors_at_one_noise_level_the_newest_is_repeated(
    make: type[Forecaster],
) -> None:
    old, new = (anchor(0.5, streams(s), streams(s + 1)) for s in (1, 3))
    now = streams(5)
    found = make().forecast(remember(make(), old, new), now, 0.3)
    assert_close(found, moved(make, now, new.residual))


@every_forecaster
@both_streams
def test_with_one_anchor_every_forecaster_repeats_it(make: type[Forecaster], text: bool) -> None:
    only = anchor(0.7, streams(1, text), streams(2, text))
    now = streams(5, text)
    found = make().forecast(remember(make(), only), now, 0.2)
    if make is DataForecaster:
        # Of a whole forward pass the latents are its input: their clean part is repeated.
        clean = only.inputs.hidden_states - 0.7 * only.residual.hidden_states
        turned = (now.hidden_states - clean) / 0.2
        torch.testing.assert_close(found.hidden_states, turned, rtol=1e-5, atol=1e-5)
        found = replace(found, hidden_states=only.residual.hidden_states)
    assert_close(found, moved(make, now, only.residual))


@every_forecaster
def test_at_its_anchor_every_forecaster_returns_what_was_computed(make: type[Forecaster]) -> None:
    old, new = (anchor(level, streams(i), streams(i + 7)) for i, level in enumerate((0.9, 0.6)))
    found = make().forecast(remember(make(), old, new), new.inputs, 0.6)
    assert_close(found, moved(make, new.inputs, new.residual))


@every_forecaster
def test_an_anchor_keeps_the_residual_or_of_a_whole_forward_pass_what_it_put_out(
    make: type[Forecaster],
) -> None:
    inputs, outputs = streams(1), streams(2)
    assert_close(moved(make, inputs, make().kept(inputs, outputs)), outputs)


@both_streams
def test_linear_is_the_ridge_regression_of_residual_on_input(text: bool) -> None:
    old, new = (
        anchor(level, streams(i, text), streams(i + 7, text)) for i, level in ((1, 1), (2, 0))
    )
    now = streams(5, text)

    def closed_form(
        x: torch.Tensor, x1: torch.Tensor, x0: torch.Tensor, r1: torch.Tensor, r0: torch.Tensor
    ) -> torch.Tensor:
        dx, dr = (x1 - x0).flatten(0, 1), (r1 - r0).flatten(0, 1)
        ridge = ONLINE_RIDGE * dx.square().sum(0).mean()
        slope = torch.stack(
            [dx[:, d] @ dr[:, d] / (dx[:, d] @ dx[:, d] + ridge) for d in range(DIM)]
        )
        return x + r1 + slope * (x - x1)

    wanted = now.map(closed_form, new.inputs, old.inputs, new.residual, old.residual)
    found = LinearForecaster().forecast(remember(LinearForecaster(), old, new), now, 0.3)
    # The slope is summed in float32.
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=1e-5, atol=1e-5)
    assert text == (found.encoder_hidden_states is not None)
    if text:
        torch.testing.assert_close(
            found.encoder_hidden_states, wanted.encoder_hidden_states, rtol=1e-5, atol=1e-5
        )


def test_linear_shrinks_the_true_slope_by_the_ridge_alone() -> None:
    # Equal energies in all channels: each slope shrinks by the factor 1 / (1 + ONLINE_RIDGE).
    signs = torch.sign(streams(1).hidden_states)
    x0, x1 = torch.zeros_like(signs), signs
    slope = torch.tensor([0.5, -0.25, 0.0, 2.0], dtype=torch.float64)
    old = anchor(1.0, Streams(x0), Streams(slope * x0))
    new = anchor(0.5, Streams(x1), Streams(slope * x1))
    memory = remember(LinearForecaster(), old, new)
    assert memory.slope is not None
    torch.testing.assert_close(memory.slope.hidden_states, slope / (1 + ONLINE_RIDGE))


def test_linear_on_an_input_that_does_not_move_is_reuse() -> None:
    still = streams(1)
    old, new = (anchor(level, still, streams(i)) for i, level in ((2, 0.9), (3, 0.6)))
    memory = remember(LinearForecaster(), old, new)
    now = streams(5)
    assert_close(LinearForecaster().forecast(memory, now, 0.3), now.map(torch.add, new.residual))


@every_forecaster
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_device_are_preserved(make: type[Forecaster], dtype: torch.dtype) -> None:
    memory = remember(
        make(),
        *(
            anchor(level, streams(i, dtype=dtype), streams(i + 7, dtype=dtype))
            for i, level in enumerate((0.9, 0.6, 0.5))
        ),
    )
    now = streams(5, dtype=dtype)
    found = make().forecast(memory, now, 0.3)
    for given, returned in (
        (now.hidden_states, found.hidden_states),
        (now.encoder_hidden_states, found.encoder_hidden_states),
    ):
        assert returned is not None and given is not None
        assert (returned.dtype, returned.device) == (given.dtype, given.device)
        assert returned.isfinite().all()


@every_forecaster
def test_forecasting_changes_neither_memory_nor_input(make: type[Forecaster]) -> None:
    anchors = [anchor(level, streams(i), streams(i + 7)) for i, level in enumerate((0.9, 0.6))]
    memory, now = remember(make(), *anchors), streams(5)
    first = make().forecast(memory, now, 0.3)
    assert_close(now, streams(5))
    assert_close(make().forecast(memory, now, 0.3), first)
    assert memory.anchors == tuple(reversed(anchors))[: make().depth]


@every_forecaster
def test_updating_returns_a_new_memory_and_leaves_the_old_one_alone(
    make: type[Forecaster],
) -> None:
    first, second = (anchor(level, streams(i), streams(i)) for i, level in ((1, 0.9), (2, 0.6)))
    old = remember(make(), first)
    new = make().update(old, second)
    assert (old.anchors, old.slope) == ((first,), None)
    assert new.anchors == (second, first)[: make().depth]


@every_forecaster
@pytest.mark.parametrize("lengths", [(6,), (2, 4), (1, 2, 3)])
def test_a_split_memory_forecasts_each_patch_as_the_whole(
    make: type[Forecaster], lengths: tuple[int, ...]
) -> None:
    anchors = [anchor(level, streams(i), streams(i + 7)) for i, level in enumerate((0.9, 0.6))]
    memory, now = remember(make(), *anchors), streams(5)
    whole = make().forecast(memory, now, 0.3)
    patches = memory.split(lengths)
    assert len(patches) == len(lengths)
    start = 0
    for length, patch in zip(lengths, patches, strict=True):
        part, wanted = (
            Streams(x.hidden_states[:, start : start + length], x.encoder_hidden_states)
            for x in (now, whole)
        )
        assert_close(make().forecast(patch, part, 0.3), wanted)
        start += length
    for index, computed in enumerate(memory.anchors):
        cut = [patch.anchors[index].reference for patch in patches]
        for field in ("hidden_states", "energy"):
            joined = torch.cat([getattr(part, field) for part in cut], dim=1)
            assert torch.equal(joined, getattr(computed.reference, field))


def test_memory_counts_the_bytes_of_its_tensors() -> None:
    computed = anchor(0.5, streams(1), streams(2))
    stream_bytes = BATCH * (TOKENS + TEXT_TOKENS) * DIM * 8
    energy_bytes = BATCH * TOKENS * 4
    assert Memory((computed, computed)).nbytes() == 2 * (2 * stream_bytes + energy_bytes)
    slope = Streams(torch.zeros(DIM), torch.zeros(DIM))
    assert Memory(slope=slope).nbytes() == 2 * DIM * 4


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("reuse", 1),
        ("linear", 1),
        ("taylor", 2),
        ("damped_taylor", 2),
        ("linear_taylor", 2),
        ("output", 2),
    ],
)
def test_only_as_many_anchors_are_kept_as_are_looked_at(name: str, depth: int) -> None:
    forecaster = FORECASTERS[name]()
    anchors = [anchor(1 - i / 10, streams(i), streams(i)) for i in range(4)]
    assert len(remember(forecaster, *anchors).anchors) == depth


@pytest.mark.parametrize(("name", "make"), FORECASTERS.items())
def test_the_option_selects_the_forecaster(name: str, make: Callable[[], Forecaster]) -> None:
    chosen = forecaster_of(CacheConfig(forecaster=name), None, DecisionGroup())
    assert type(chosen) is make

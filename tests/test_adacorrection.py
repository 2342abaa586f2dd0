"""AdaCorrection: exact where its rule says so, harmless where it has nothing to say, useful."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.toy import PROMPTS, psnr
from test_backends import Pipeline
from test_forecasters import DIM, anchor, assert_close, remember, streams

from xfuser_fastcache import CacheConfig, apply_cache_on_transformer, remove_cache
from xfuser_fastcache.backends import FORECASTERS, forecaster_of
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.forecasters.adacorrection import AdaCorrection
from xfuser_fastcache.forecasters.reuse import ReuseForecaster
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory

SPANS = [
    name
    for name, make in FORECASTERS.items()
    if not make.whole_forward and make is not AdaCorrection
]
every_forecaster = pytest.mark.parametrize("name", SPANS)
START, WAY, CONSTANT = streams(1), streams(2), streams(3)


def at(level: float) -> Streams:
    """An input that moves on a line as the noise falls."""
    return START.map(lambda x, d: x + level * d, WAY)


def residual(level: float) -> Streams:
    """What is linear in that input."""
    return at(level).map(lambda x, c: 0.3 * x + c, CONSTANT)


def corrected(gamma: float = 1.0, lam: float = 1.0) -> AdaCorrection:
    return AdaCorrection(ReuseForecaster(), gamma, lam)


@pytest.mark.parametrize("lam", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("gap", [0.0, 0.1, 0.3])
def test_over_reuse_it_is_exact_on_a_line_up_to_the_gap_before(lam: float, gap: float) -> None:
    made = corrected(lam=lam)
    memory = remember(made, *(anchor(level, at(level), residual(level)) for level in (1.0, 0.7)))
    now = at(0.7 - gap)
    wanted = now.map(torch.add, residual(0.7 - gap))
    found = made.forecast(memory, now, 0.7 - gap)
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.encoder_hidden_states, wanted.encoder_hidden_states, rtol=1e-5, atol=1e-5
    )


def test_beyond_that_gap_it_adds_the_whole_error_and_no_more() -> None:
    made = corrected()
    memory = remember(made, *(anchor(level, at(level), residual(level)) for level in (1.0, 0.7)))
    now = at(0.1)
    plain = ReuseForecaster().forecast(memory, now, 0.1)
    assert memory.missed is not None
    assert_close(made.forecast(memory, now, 0.1), plain.map(torch.add, memory.missed))


def test_a_token_that_had_not_moved_before_takes_its_share_of_the_error() -> None:
    for gamma, share in ((0.0, 0.0), (1.0, 1.0), (1e9, 1.0)):
        made = corrected(gamma)
        memory = remember(made, *(anchor(level, at(1.0), residual(level)) for level in (1.0, 0.7)))
        found, plain = (used.forecast(memory, at(30.0), 0.5) for used in (made, ReuseForecaster()))
        assert memory.missed is not None
        assert_close(found, plain.map(lambda x, e, s=share: x + s * e, memory.missed))


def test_a_token_that_stands_still_is_left_alone() -> None:
    made = corrected()
    memory = remember(made, *(anchor(level, at(level), residual(level)) for level in (1.0, 0.7)))
    now = at(0.6)
    now.hidden_states[:, 2] = at(0.7).hidden_states[:, 2]
    found, plain = made.forecast(memory, now, 0.6), ReuseForecaster().forecast(memory, now, 0.6)
    same = (found.hidden_states == plain.hidden_states).all(dim=(0, 2))
    assert same.tolist() == [index == 2 for index in range(len(same))]


def test_spatial_variation_weighs_by_lambda() -> None:
    """A change that is alike in all channels has no variance; one that is not, has."""
    shift = Streams(torch.ones(1, 2, DIM, dtype=torch.float64))
    spread = Streams(torch.tensor([1.0, -1.0] * (DIM // 2), dtype=torch.float64).expand(1, 2, DIM))
    nothing = Streams(torch.zeros(1, 2, DIM, dtype=torch.float64))
    # The error came about over a shift of 2; now the input moves by 1, shifted or spread.
    far = shift.map(lambda x: -2 * x)
    for lam in (0.0, 3.0):
        made = corrected(lam=lam)
        memory = remember(made, anchor(1.0, far, nothing), anchor(0.9, nothing, shift))
        for change, wanted in ((shift, 0.5), (spread, min(1.0, 0.5 * (1 + lam) ** 0.5))):
            found = made.forecast(memory, change, 0.8).map(torch.sub, change).map(torch.sub, shift)
            assert found.hidden_states.unique().tolist() == pytest.approx([wanted])


@every_forecaster
@pytest.mark.parametrize("text", [True, False])
def test_without_sensitivity_or_history_it_is_the_forecaster(name: str, text: bool) -> None:
    plain = FORECASTERS[name]()
    anchors = [
        anchor(s, streams(i, text), streams(i + 9, text)) for i, s in enumerate((1, 0.8, 0.5))
    ]
    now = streams(50, text)
    for made, held in ((AdaCorrection(plain, 0.0), anchors), (AdaCorrection(plain), anchors[:1])):
        assert_same(
            made.forecast(remember(made, *held), now, 0.3),
            plain.forecast(remember(plain, *held), now, 0.3),
        )


def assert_same(found: Streams, wanted: Streams) -> None:
    assert torch.equal(found.hidden_states, wanted.hidden_states)
    if wanted.encoder_hidden_states is None:
        assert found.encoder_hidden_states is None
    else:
        assert torch.equal(found.encoder_hidden_states, wanted.encoder_hidden_states)


@every_forecaster
def test_what_it_remembers_is_cut_into_patches_and_counted(name: str) -> None:
    made = AdaCorrection(FORECASTERS[name]())
    anchors = [anchor(s, streams(i), streams(i + 9)) for i, s in enumerate((1.0, 0.8, 0.5))]
    whole, now = remember(made, *anchors), streams(50)
    wanted = made.forecast(whole, now, 0.3)
    parts = zip(whole.split((2, 4)), now.split((2, 4)), strict=True)
    found = [made.forecast(memory, part, 0.3) for memory, part in parts]
    joined = torch.cat([part.hidden_states for part in found], dim=1)
    torch.testing.assert_close(joined, wanted.hidden_states)
    without = Memory(whole.anchors, whole.slope)
    assert whole.missed is not None
    assert whole.nbytes() == without.nbytes() + whole.missed.nbytes()


@every_forecaster
@pytest.mark.parametrize("model", ["flux", "sd3", "pixart"])
def test_it_runs_over_every_forecaster_and_repeats(name: str, model: str) -> None:
    found = Pipeline(model)
    uncached = found()
    options: dict[str, Any] = {"cache_ratio_threshold": 12.0, "forecaster": name}
    found.cache("Fast", **options)
    plain = found()
    remove_cache(found.transformer)
    found.cache("Fast", enable_adacorrection=True, **options)
    first = found()
    assert torch.equal(found(), first)
    assert not torch.equal(first, plain) and first.isfinite().all()
    remove_cache(found.transformer)
    found.cache("Fast", enable_adacorrection=True, forecaster=name, cache_ratio_threshold=0)
    assert torch.equal(found(), uncached)


def test_on_the_toy_it_brings_reuse_nearer_to_the_uncached_picture() -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained("toys/flux", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def generate() -> torch.Tensor:
        return pipe(
            PROMPTS, height=128, width=128, num_inference_steps=12, max_sequence_length=32,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip

    control = generate()
    found = {}
    for enabled in (False, True):
        apply_cache_on_transformer(
            pipe.transformer, scheduler=pipe.scheduler, forecaster="reuse",
            steps_mask=[1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1], enable_adacorrection=enabled,
        )  # fmt: skip
        found[enabled] = psnr(generate(), control)
        remove_cache(pipe.transformer)
    assert found[True] > found[False] + 3, found


@pytest.mark.parametrize("options", [{"forecaster": "output"}, {"calibration": "x"}])
def test_it_is_refused_where_the_whole_forward_pass_is_forecast(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="enable_adacorrection"):
        CacheConfig(enable_adacorrection=True, **options)


def test_the_options_reach_the_forecaster() -> None:
    options = {"adacorr_gamma": 0.5, "adacorr_lambda": 2.0, "forecaster": "taylor2"}
    config = CacheConfig(enable_adacorrection=True, **options)
    made = forecaster_of(config, None, DecisionGroup())
    assert isinstance(made, AdaCorrection)
    assert (made.gamma, made.lam, type(made.of)) == (0.5, 2.0, FORECASTERS["taylor2"])
    assert made.depth == 3
    spelled = {"name": "adacorrection", "of": "taylor2", "gamma": 0.5, "lam": 2.0}
    assert CacheConfig(forecaster=spelled).resolved() == config.resolved()
    assert CacheConfig(forecaster=spelled).digest() == config.digest()


def test_it_corrects_forecasters_with_options_of_their_own() -> None:
    of = {"name": "damped_taylor", "share": 0.7}
    config = CacheConfig(forecaster={"name": "adacorrection", "of": of}).resolved()
    assert config.methods.forecaster.of.share == 0.7
    assert config.forecaster["of"] == of
    assert CacheConfig(forecaster=of, enable_adacorrection=True).resolved() == config


@pytest.mark.parametrize(
    "options",
    [
        {"forecaster": "adacorrection", "enable_adacorrection": True},
        {"forecaster": {"name": "adacorrection", "of": "adacorrection"}},
    ],
)
def test_a_correction_is_not_corrected(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs to be the only correction of forecasts"):
        CacheConfig(**options)

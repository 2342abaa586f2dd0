"""Calibration files: what is read back, what is refused and why, and what a cache does with one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from safetensors.torch import save_file
from support.calibrations import even_levels, fitted_for, fitted_on
from support.flux import STEPS, Flux, tiny_vae
from support.loops import Branch, alone, denoise

from diffusers_adapters.tiny import TINY_PIPELINES
from diffusers_adapters.tiny.flux import tiny_flux
from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache
from xfuser_fastcache.artifacts.calibration import CALIBRATION, VERSION, Fitted, load_fitted
from xfuser_fastcache.artifacts.file import Kind, write_file
from xfuser_fastcache.artifacts.moved import moved
from xfuser_fastcache.hooks import hook_on

TABLES = ("noise_levels", "weights", "slopes", "degrees", "steering", "steering_guided")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def flux() -> Flux:
    return Flux()


def cached(flux: Flux, path: Any, **options: Any) -> Flux:
    """Put a cache with this calibration on the transformer."""
    options = {"scheduler": flux.pipe.scheduler, **options}
    apply_cache_on_transformer(flux.transformer, calibration=str(path), **options)
    return flux


def saved(path: Path, fitted: Fitted) -> str:
    fitted.save(path)
    return str(path)


# ---- the file -----------------------------------------------------------------------------------


def random_tables(seed: int = 0) -> Fitted:
    rng = np.random.default_rng(seed)
    fitted = fitted_on(np.sort(rng.random(5))[::-1], lags=2)
    for name in TABLES[1:]:
        table = getattr(fitted, name)
        table[:] = abs(rng.normal(size=table.shape))
    fitted.slopes[0] = np.inf
    steering = {"steering": (5,), "steering_guided": (2, 5)}
    return dataclasses.replace(
        fitted,
        **{name: rng.normal(size=(2, 5, *n)).astype(np.float32) for name, n in steering.items()},
        exponents=(-0.1 - 0.2, 0.1 + 0.2),
        upper=1.7,
        scales={0.05: 0.1 + 0.2, 1e-5: 0.0},
        masks={2: [1, 0, 0, 1, 0], 5: [1] * 5},
        metadata={"cache_ratio_threshold": 0.1, "call": {"height": 8}, "model": "a"},
    )


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    fitted = random_tables()
    found = load_fitted(saved(tmp_path / "deep" / "er" / "file", fitted))
    for name in TABLES:
        one, other = getattr(found, name), getattr(fitted, name)
        assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes()), name
    for name in ("exponents", "upper", "scales", "masks", "metadata"):
        assert getattr(found, name) == getattr(fitted, name)
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["file"]


def test_what_earlier_releases_kept_for_stages_without_latents_is_left_out(tmp_path: Path) -> None:
    fitted = random_tables()
    tables = {name: getattr(fitted, name) for name in TABLES}
    tables |= {
        name: np.zeros((2, 5, 3), np.float32) for name in ("weights_blind", "steering_blind")
    }
    numbers = {name: getattr(fitted, name) for name in ("exponents", "upper", "scales", "masks")}
    path = tmp_path / "file"
    write_file(path, CALIBRATION, tables, {**fitted.metadata, **numbers})
    for name in TABLES:
        assert np.array_equal(getattr(load_fitted(path), name), tables[name])


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    one, same, other = (
        load_fitted(saved(tmp_path / name, fitted))
        for name, fitted in (
            ("a", random_tables()),
            ("b", random_tables()),
            ("c", random_tables(1)),
        )
    )
    assert one.digest == same.digest != other.digest
    lambda_apart = dataclasses.replace(random_tables(), scales={0.05: 0.3})
    assert load_fitted(saved(tmp_path / "d", lambda_apart)).digest != one.digest
    assert len(one.digest) == 64


def test_a_mask_finds_the_corrections_that_were_made_for_it() -> None:
    fitted = random_tables()
    for row, mask in enumerate(([1, 0, 0, 1, 0], [1] * 5)):
        found = fitted.trajectory_correction(mask)
        assert found is not None and found.mask == mask and found.guided is not None
        assert np.array_equal(found.weights, fitted.steering[row])
        assert np.array_equal(found.guided, fitted.steering_guided[row])
    unguided = dataclasses.replace(fitted, steering_guided=fitted.steering_guided[:0])
    found = unguided.trajectory_correction([1] * 5)
    assert found is not None and found.guided is None
    assert fitted.trajectory_correction([1, 0, 1, 0, 0]) is None
    assert fitted.trajectory_correction(None) is None
    bare = fitted_on(fitted.noise_levels, lags=2, masks=fitted.masks)
    assert bare.trajectory_correction([1] * 5) is None


def cut_off(count: int) -> Callable[[Path], None]:
    """Return what writes a calibration's first bytes; `count` below 0 leaves out the last ones."""

    def write(path: Path) -> None:
        fitted_on([1.0, 0.5]).save(path)
        path.write_bytes(path.read_bytes()[:count])

    return write


NUMBERS: dict[str, Any] = {
    **{"exponents": [1.0, 0.0], "upper": 1.0, "scales": {}, "masks": {}},
    "cache_ratio_threshold": 0.3,
}


def with_metadata(kind: Kind = CALIBRATION, **changes: Any) -> Callable[[Path], None]:
    """Return what writes a calibration of two steps with other metadata; None leaves one out."""

    def write(path: Path) -> None:
        fitted = fitted_on([1.0, 0.5])
        tables = {name: getattr(fitted, name) for name in TABLES}
        meta = {k: v for k, v in {**NUMBERS, **changes}.items() if v is not None}
        write_file(path, kind, tables, meta)

    return write


def of_version(version: Any) -> Callable[[Path], None]:
    return with_metadata(CALIBRATION._replace(version=version))


def with_tables(**changes: Any) -> Callable[[Path], None]:
    """Return what writes a calibration of two steps with other tables; None leaves one out."""

    def write(path: Path) -> None:
        fitted = fitted_on([1.0, 0.5])
        tables = {name: getattr(fitted, name) for name in TABLES} | changes
        held = {name: table for name, table in tables.items() if table is not None}
        write_file(path, CALIBRATION, held, NUMBERS)

    return write


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "cannot read the calibration .*No such file"),
    "a folder": (lambda path: path.mkdir(), "cannot read the calibration"),
    "empty": (lambda path: path.write_bytes(b""), "is no whole calibration file"),
    "text": (lambda path: path.write_text("alpha: 0.05\n" * 9), "is no whole calibration file"),
    "first bytes": (cut_off(20), "is no whole calibration file"),
    "half": (cut_off(700), "is no whole calibration file"),
    "one byte short": (cut_off(-1), "is no whole calibration file"),
    "weights": (lambda p: save_file({"a": torch.ones(2)}, p), "of version None; this release"),
    "diffusers' weights": (
        lambda p: save_file({"a": torch.ones(2)}, p, {"format": "pt"}), "is no whole calibration",
    ),
    "bfloat16 weights": (
        lambda p: save_file({"a": torch.ones(2).bfloat16()}, p), "is no whole calibration file",
    ),
    "older": (of_version(1), f"version 1; this release reads version {VERSION}, and 6 of earl"),
    "newer": (of_version(VERSION + 1), f"version {VERSION + 1}; this release reads"),
    "a version of words": (of_version("seven"), "holds calibration of version seven; this rel"),
    "no version": (of_version(None), "of version None; .* anew with fastcache"),
    "no slopes": (with_tables(slopes=None), "file' holds degrees, noise_levels, steering,"),
    "unknown table": (with_tables(more=np.ones(2)), "' holds degrees, more, noise_levels, slopes"),
    "no scales": (with_metadata(scales=None), "contradicts itself: 'scales'"),
    "scales of words": (with_metadata(scales={"much": 1.0}), "contradicts itself: could not conv"),
    "levels of another plan": (
        with_tables(noise_levels=np.ones(3)), r"itself: noise_levels has the shape \(3,\), and the",
    ),
    "weights of more lags": (
        with_tables(weights=np.zeros((2, 4, 5, 4), np.float32)), r"weights has the shape \(2, 4, 5",
    ),
    "flat slopes": (with_tables(slopes=np.ones(6)), "contradicts itself: noise_levels has the sh"),
    "steering without masks": (
        with_tables(steering=np.zeros((1, 2, 5), np.float32)),
        r"steering has the shape \(1, 2, 5\), for 0 masks of 2 steps",
    ),
    "one branch": (
        with_tables(steering_guided=np.zeros((0, 2, 1, 5), np.float32)),
        r"steering_guided has the shape \(0, 2, 1, 5\)",
    ),
    "steering of other terms": (
        with_tables(steering=np.zeros((0, 2, 3), np.float32)), "steering has the shape",
    ),
    "a mask too long": (with_metadata(masks={2: [1, 1, 0]}), "the mask of 2 steps is .1, 1, 0"),
    "a mask of another sum": (with_metadata(masks={2: [1, 0]}), "the mask of 2 steps is .1, 0., f"),
    "a mask of flags": (with_metadata(masks={1: [1.0, 0]}), "the mask .1.0, 0. is no list of 0"),
    "a mask that begins late": (with_metadata(masks={1: [0, 1]}), "the mask .0, 1. is no list of"),
    "a mask of words": (with_metadata(masks={1: "10"}), "contradicts itself: unsupported operand"),
    "no mapping of masks": (with_metadata(masks=[[1, 0]]), "contradicts itself: 'list' object has"),
    "NaN": (
        with_tables(weights=np.full((2, 3, 4, 4), np.nan, np.float32)),
        "contradicts itself: weights is a table of float32 with values outside of -1e.06 to 1e.06",
    ),
    "infinite": (
        with_tables(noise_levels=np.array([np.inf, 0.5])), "itself: noise_levels is a table of fl",
    ),
    "a slope below 0": (with_tables(slopes=np.full((2, 3, 4), -1.0)), "itself: slopes is a table"),
    "no degree": (with_tables(degrees=np.zeros((2, 3, 4))), "itself: degrees is a table of"),
    "integers": (
        with_tables(weights=np.zeros((2, 3, 4, 4), np.int32)),
        "weights is a table of int32 with .* or of another type than float32",
    ),
    "exponents": (with_metadata(exponents=[1e3, 0.0]), r"exponents\[0\] is 1000.0; allowed: -8"),
    "words for exponents": (with_metadata(exponents="ab"), r"exponents\[0\] is 'a'; allowed"),
    "one exponent": (with_metadata(exponents=[1.0]), "there are 1 exponents; allowed: 2"),
    "no upper": (with_metadata(upper=0), "upper is 0; allowed: 1e-300 to 1e.06"),
    "an infinite upper": (with_metadata(upper=float("inf")), "upper is inf; allowed: 1e-300 to 1e"),
    "a scale that is NaN": (
        with_metadata(scales={"0.05": float("nan")}), "the scale of alpha = 0.05 is nan; allowed",
    ),
    "alpha": (with_metadata(scales={"1.5": 1.0}), "alpha = 1.5 is 1.5; allowed: 1e-300 to 1"),
    "no epsilon": (with_metadata(cache_ratio_threshold=None), "cache_ratio_threshold is None"),
    "epsilon": (with_metadata(cache_ratio_threshold="0.3"), "cache_ratio_threshold is '0.3'; all"),
    "deep metadata": (
        lambda p: save_file({"a": torch.ones(2)}, p, {"call": "[" * 99_999}), "is no whole calibr",
    ),
    "a pipe": (lambda path: os.mkfifo(path), "cannot read the calibration .* no regular file"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_whole_calibration_is_refused_and_leaves_the_transformer_alone(
    flux: Flux, tmp_path: Path, write: Callable[[Path], Any], words: str
) -> None:
    path = tmp_path / "file"
    write(path)
    with pytest.raises(ValueError, match=words):
        cached(flux, path)
    assert hook_on(flux.transformer) is None
    assert not any(
        {"_diffusers_hook", "forward"} & set(vars(m)) for m in flux.transformer.modules()
    )


# ---- what it was made for -----------------------------------------------------------------------


def other_config(flux: Flux) -> None:
    flux.transformer.register_to_config(guidance_embeds=True)


def other_model(**changes: Any) -> Callable[[Flux], None]:
    def change(flux: Flux) -> None:
        flux.pipe.transformer = flux.transformer = tiny_flux(**changes)[0].transformer

    return change


def to_bfloat16(flux: Flux) -> None:
    flux.transformer.to(torch.bfloat16)


OTHERS: dict[str, tuple[Callable[[Flux], None], str]] = {
    "config": (other_config, r"\(model config: \w{16} in the file, \w{16} here\)"),
    "weights": (other_model(seed=1), r"\(weights: \w{16} in the file, \w{16} here\)"),
    "blocks": (other_model(num_layers=3), r"\(model config: .*; blocks: 6 in the file, 7 here"),
    "dtype": (to_bfloat16, r"\(dtype family: float32 in the file, half here\)"),
}


@pytest.mark.parametrize(("change", "words"), OTHERS.values(), ids=OTHERS)
def test_a_calibration_of_another_model_is_refused_by_what_differs(
    flux: Flux, tmp_path: Path, change: Callable[[Flux], None], words: str
) -> None:
    path = saved(tmp_path / "file", fitted_for(flux.pipe, STEPS))
    change(flux)
    with pytest.raises(ValueError, match=f"'{path}' was made for another model {words}"):
        cached(flux, path)
    assert hook_on(flux.transformer) is None


def test_a_calibration_of_another_class_is_refused(flux: Flux, tmp_path: Path) -> None:
    sd3 = TINY_PIPELINES["sd3"]()[0]
    path = saved(tmp_path / "file", fitted_for(sd3, STEPS))
    words = r"\(model: SD3Transformer2DModel in the file, FluxTransformer2DModel here; model config"
    with pytest.raises(ValueError, match=words):
        cached(flux, path)


@pytest.mark.parametrize("made", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("used", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
def test_both_half_precisions_of_one_checkpoint_are_one_model(
    family: str, made: torch.dtype, used: torch.dtype
) -> None:
    """Of float32 weights, which the two round to different bits."""
    one, other = (
        fitted_for(TINY_PIPELINES[family]()[0].to(dtype), STEPS).metadata for dtype in (made, used)
    )
    assert one == other and one["dtype_family"] == "half"


@pytest.mark.parametrize("change", [1e-2, 1e-3])
def test_weights_that_were_trained_on_are_another_model(change: float) -> None:
    pipe = tiny_flux()[0]
    before = fitted_for(pipe, STEPS).metadata["weights"]
    for parameter in pipe.transformer.time_text_embed.parameters():
        parameter.add_(change * torch.randn_like(parameter))
    assert fitted_for(pipe, STEPS).metadata["weights"] != before


@pytest.mark.parametrize(
    ("layout", "warned"),
    [({}, False), ({"layout": "without PipeFusion"}, False), ({"layout": "PipeFusion: 2"}, True)],
)
def test_a_calibration_of_stages_is_warned_of_where_there_are_none(
    flux: Flux,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    layout: dict[str, str],
    warned: bool,
) -> None:
    fitted = fitted_for(flux.pipe, STEPS, metadata=layout)
    assert fitted.of_stages == warned
    cached(flux, saved(tmp_path / "file", fitted))
    assert ("was made under PipeFusion: 2: its masks" in caplog.text) == warned


def test_a_calibration_finds_its_pipelines_scheduler_and_is_refused_without_any(
    flux: Flux, tmp_path: Path
) -> None:
    path = saved(tmp_path / "file", fitted_for(flux.pipe, STEPS))
    wanted = cached(flux, path)()
    remove_cache(flux.transformer)
    assert torch.equal(cached(flux, path, scheduler=None)(), wanted)
    remove_cache(flux.transformer)
    flux.pipe.transformer = None
    with pytest.raises(ValueError, match="no pipeline holds this .* pass scheduler=pipe.s"):
        cached(flux, path, scheduler=None)
    assert hook_on(flux.transformer) is None


OTHER_PLANS = pytest.mark.parametrize(
    ("steps", "shift", "words"),
    [
        (STEPS - 1, 1.0, "it plans 8 steps, this one 7. It goes on"),
        # s -> 3 s / (1 + 2 s) moves most where s is sqrt(3) - 1 over 2: step 5 of 0 to 7.
        (STEPS, 3.0, "step 5 has the noise level 0.37500 there and 0.64286 here"),
    ],
    ids=["steps", "noise levels"],
)
EVERY_OTHER = [int(step % 2 == 0) for step in range(STEPS)]


def corrected() -> dict[str, Any]:
    """Return a mask of four steps, and corrections that nobody overlooks."""
    weights = np.full((1, STEPS, 5), 0.25, np.float32)
    return {"masks": {4: EVERY_OTHER}, "steering": weights}


@OTHER_PLANS
@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ({"computed_steps": 4}, {"computed_steps": 4}),
        ({"quality": "medium"}, {"quality": "medium"}),
        # No cell is for it: the gate, loose as it is, skips nothing.
        ({"cache_ratio_threshold": 0.3}, {"cache_ratio_threshold": 0}),
    ],
    ids=["computed_steps", "quality", "gate"],
)
def test_a_plan_that_a_calibration_does_not_cover_goes_on_as_without(
    flux: Flux,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    steps: int,
    shift: float,
    words: str,
    options: dict[str, Any],
    alone: dict[str, Any],
) -> None:
    path = saved(tmp_path / "file", fitted_for(flux.pipe, STEPS, **corrected()))
    right, other = flux.pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=shift)

    def apply(**given: Any) -> None:
        if hook_on(flux.transformer):
            remove_cache(flux.transformer)
        apply_cache_on_transformer(flux.transformer, **given)

    apply(calibration=path, **options)
    covered = flux()
    flux.pipe.scheduler = other
    apply(**alone)
    wanted = flux(num_inference_steps=steps)

    # One cache, and pictures of both plans in turn: neither leaves anything in the other.
    apply(calibration=path, **options)
    for _ in range(2):
        flux.pipe.scheduler = other
        assert torch.equal(flux(num_inference_steps=steps), wanted)
        flux.pipe.scheduler = right
        assert torch.equal(flux(), covered)
    assert not torch.equal(covered, wanted)
    said = [r.getMessage() for r in caplog.records if "calibration is not for" in r.getMessage()]
    assert len(said) == 1 and words in said[0]


@pytest.mark.parametrize(("strength", "skips"), [(0.5, False), (1.0, True)])
def test_the_gate_skips_nothing_where_image_to_image_enters_the_plan(
    strength: float, skips: bool, tmp_path: Path
) -> None:
    """Its noise levels are those of the calibration, whose cells promise nothing for it."""
    flux = Flux()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxImg2ImgPipeline(
        scheduler=flux.pipe.scheduler, transformer=flux.transformer, vae=tiny_vae(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    call = flux.call | {"num_inference_steps": STEPS, "image": torch.zeros(1, 3, 128, 128)}
    often = {"cache_ratio_threshold": 50.0}
    path = saved(tmp_path / "file", fitted_for(flux.pipe, STEPS, metadata=often))
    apply_cache_on_transformer(pipe.transformer, scheduler=pipe.scheduler, calibration=path)
    pipe(**call, strength=strength)
    assert (get_cache_statistics(pipe.transformer)["block_approx_ratio"] > 0) == skips


def random_steering(masks: dict[int, list[int]], steps: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    weights = rng.normal(scale=0.1, size=(len(masks), steps, 5)).astype(np.float32)
    return {"masks": masks, "steering": weights}


def test_a_mask_and_its_corrections_move_to_the_same_places_of_another_plan() -> None:
    mask = [1, 0, 0, 0, 1, 0, 0, 1]
    fitted = fitted_on(np.linspace(1, 0.125, 8), **random_steering({3: mask}, 8))
    same = moved(fitted, 3, list(fitted.noise_levels))
    assert same is not None and same.masks == {3: mask}
    np.testing.assert_allclose(same.steering, fitted.steering, atol=1e-6)
    finer = moved(fitted, 3, list(np.linspace(1, 0.0625, 16)))
    assert finer is not None and finer.masks == {3: [int(i in (0, 8, 14)) for i in range(16)]}
    # Every other step of the finer plan is one of the file's; between them it is linear.
    np.testing.assert_allclose(finer.steering[0, ::2], fitted.steering[0], atol=1e-6)
    np.testing.assert_allclose(finer.steering[0, 3], fitted.steering[0, 1:3].mean(0), atol=1e-6)
    for computed, steps in ((2, 20), (3, 6)):
        assert moved(fitted, computed, list(np.linspace(1, 1 / steps, steps))) is None
    twice = np.repeat(np.linspace(1, 0.1, 10), 2)
    assert moved(fitted, 3, list(twice)) is None
    assert moved(dataclasses.replace(fitted, steering=fitted.steering[:0]), 3, [1.0] * 20) is None


def test_a_travelling_budget_is_that_of_a_file_for_the_other_plan(
    flux: Flux, tmp_path: Path
) -> None:
    fitted = fitted_for(flux.pipe, STEPS, **random_steering({3: [1, 0, 0, 1, 0, 0, 1, 0]}, STEPS))
    levels = even_levels(24)
    other = moved(fitted, 3, list(levels))
    assert other is not None
    found = []
    for name, file in (("own", fitted), ("other", other)):
        path = saved(tmp_path / name, file)
        apply_cache_on_transformer(flux.transformer, calibration=path, computed_steps=3)
        found.append(flux(num_inference_steps=24))
        assert flux.flags == [1 - flag for flag in other.masks[3]]
        remove_cache(flux.transformer)
    # The scheduler's noise levels are those of the file but for rounding.
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    apply_cache_on_transformer(flux.transformer, forecaster="output", steps_mask=other.masks[3])
    assert (flux(num_inference_steps=24) - found[0]).abs().max() > 0.01


def test_a_mask_of_the_users_runs_uncorrected_at_other_noise_levels(
    flux: Flux, tmp_path: Path
) -> None:
    path = saved(tmp_path / "file", fitted_for(flux.pipe, STEPS, **corrected()))
    apply_cache_on_transformer(flux.transformer, calibration=path, steps_mask=EVERY_OTHER)
    covered = flux()
    flux.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = flux()
    with pytest.raises(ValueError, match="steps_mask has 8 entries, but this generation has 7"):
        flux(num_inference_steps=STEPS - 1)
    remove_cache(flux.transformer)
    apply_cache_on_transformer(flux.transformer, forecaster="data", steps_mask=EVERY_OTHER)
    assert torch.equal(flux(), found) and not torch.equal(found, covered)


@pytest.mark.parametrize(("apart", "differs"), [(5e-6, False), (2e-5, True)])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_one_noise_level_apart_is_another_plan(step: int, apart: float, differs: bool) -> None:
    levels = [1.0, 0.9, 0.5, 0.3, 0.1]
    other = [level + apart * (index == step) for index, level in enumerate(levels)]
    assert fitted_on(levels).differs_from(levels) is None
    found = fitted_on(levels).differs_from(other)
    assert (found or "").startswith(f"step {step} has the noise level") == differs


def test_a_plan_that_is_not_known_is_not_covered(
    flux: Flux, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path / "file", fitted_for(flux.pipe, STEPS))
    transformer = alone(scheduler=SimpleNamespace(), calibration=path, cache_ratio_threshold=0.3)
    denoise(transformer, Branch(0), scheduler=None)
    assert "it plans 8 steps, and this one's plan is not known" in caplog.text
    assert get_cache_statistics(transformer)["block_approx_ratio"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_ratio_threshold": 0.2}, "cache_ratio_threshold=0.2 is not what .* for .0.3."),
        ({"significance_level": 0.01}, "significance_level=0.01: the calibration is for 0.05, 0.1"),
        ({"computed_steps": 5}, "computed_steps=5: the calibration has masks of 3, 4 steps"),
        ({"granularity": 3}, "granularity=3 does not go with calibration='"),
    ],
    ids=["epsilon", "alpha", "computed_steps", "granularity"],
)  # fmt: skip
def test_options_that_the_file_does_not_know_are_refused(
    flux: Flux, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    masks = {3: [1, 0, 0, 1, 0, 0, 0, 1], 4: [1, 1, 0, 1, 0, 0, 0, 1]}
    path = saved(tmp_path / "file", fitted_for(flux.pipe, STEPS, masks=masks))
    with pytest.raises(ValueError, match=words):
        cached(flux, path, **options)
    assert hook_on(flux.transformer) is None

"""Fitted linear maps from the command to the cache: `fastcache fit-maps`, its file, `linear_maps`.

CPU: the toy FLUX with a few steps, once as it is and once with a stack whose residual is affine in
its input. gloo: one world a layout (`maps_worker.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibrations import fitted_for
from support.flux import STEPS, Flux
from support.toy import MASK, PROMPTS
from support.toy import STEPS as TOY_STEPS
from support.worlds import ROOT, run_world

from diffusers_adapters.flux import FluxAdapter
from diffusers_adapters.tiny.flux import tiny_flux
from xfuser_fastcache import (
    CacheConfig,
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.artifacts.file import write_file
from xfuser_fastcache.artifacts.linear_map import LinearMap, SpanMaps
from xfuser_fastcache.artifacts.linear_maps import LINEAR_MAPS, FittedMaps, load_maps
from xfuser_fastcache.calibration.stack import StackRecorder
from xfuser_fastcache.cli import fit_maps
from xfuser_fastcache.consensus.topology import DecisionGroup, PlainLayout
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.xdit.loaded import load_pipeline

MODEL = str(ROOT / "toys" / "flux")
FLAGS = [
    "--model", MODEL, "--num_prompts", "6", "--num_inference_steps", "7", "--max_lag", "2",
    "--buckets", "2", "--dtype", "float32",
]  # fmt: skip
SIZE = {"height": 128, "width": 128, "max_sequence_length": 32, "output_type": "latent"}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- by hand ------------------------------------------------------------------------------------


def some_maps(dim: int, scale: float = 0.1, seed: int = 0) -> dict[str, SpanMaps]:
    """Return maps of two buckets: diagonal and rank 2 for the image, a bias for the text."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=rng)

    image = (
        LinearMap(diagonal=random(dim), bias=random(dim)),
        LinearMap(diagonal=random(dim), u=random(dim, 2), v=random(dim, 2)),
    )
    maps = SpanMaps((0.2, 0.6), image, (None, LinearMap(bias=random(dim))))
    return {"linear": maps, "linear_taylor": SpanMaps((0.2, 0.6), image[::-1], (None, None))}


def maps_for(pipe: Any, **changes: Any) -> FittedMaps:
    metadata = fitted_for(pipe, STEPS).metadata
    return FittedMaps(some_maps(pipe.transformer.inner_dim, **changes), metadata)


def saved(path: Path, fitted: FittedMaps) -> str:
    fitted.save(path)
    return str(path)


def tensors_of(fitted: FittedMaps) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{stream}.{bucket}.{tensor}": value
        for name, maps in fitted.of.items()
        for stream in ("image", "text")
        for bucket, used in enumerate(getattr(maps, stream))
        if used is not None
        for tensor, value in used.tensors().items()
    }


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    made = maps_for(tiny_flux()[0])
    found = load_maps(saved(tmp_path / "deep" / "file", made))
    one, other = tensors_of(found), tensors_of(made)
    assert one.keys() == other.keys() and len(one) == 11
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {maps.edges for maps in found.of.values()} == {(0.2, 0.6)}
    assert found.metadata == made.metadata
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
    again = load_maps(saved(tmp_path / "again", made)).digest
    apart = load_maps(saved(tmp_path / "apart", maps_for(tiny_flux()[0], seed=1))).digest
    assert found.digest == again != apart


def written(**changes: Any) -> Callable[[Path], None]:
    """Return what writes a file of maps with other metadata or tables; None leaves one out."""

    def write(path: Path) -> None:
        tables = {"linear.image.0.diagonal": torch.ones(4).numpy()}
        meta = {"edges": [0.1, 0.2]}
        for name, value in changes.items():
            (meta if name in meta else tables)[name.replace("__", ".")] = value
        tables, meta = ({k: v for k, v in held.items() if v is not None} for held in (tables, meta))
        write_file(path, LINEAR_MAPS, tables, meta)

    return write


def cut_off(path: Path) -> None:
    written()(path)
    path.write_bytes(path.read_bytes()[:-5])


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut_off, "no whole linear_maps file .*anew with fastcache fit-maps"),
    "calibration": (
        lambda path: fitted_for(tiny_flux()[0], STEPS).save(path),
        "holds linear_maps of version None; this release reads version 2, and 1 of earlier",
    ),
    "edges": (written(edges=[0.2, 0.1]), "contradicts itself: edges are .*; allowed: finite, asc"),
    "edges of words": (written(edges=["0.1", "0.2"]), "contradicts itself: '<' not supported betw"),
    "one edge": (written(edges=0.1), "contradicts itself: 'float' object is not iterable"),
    "an infinite edge": (written(edges=[0.1, float("inf")]), "contradicts itself: edges are .*inf"),
    "NaN": (
        written(linear__image__0__bias=torch.full((4,), float("nan")).numpy()),
        "contradicts itself: linear.image.0.bias of shape .4,. holds values that are not finite",
    ),
    "vast": (
        written(linear__image__0__bias=torch.full((4,), 1e30).numpy()),
        "linear.image.0.bias of shape .4,. holds values .* allowed: finite ones, at most 1e.06",
    ),
    "integers": (
        written(linear__image__0__diagonal=torch.ones(4, dtype=torch.int32).numpy()),
        "contradicts itself: linear.image.0.diagonal has dtype torch.int32; allowed: one floating",
    ),
    "bucket": (
        written(linear__image__2__bias=torch.ones(4).numpy()),
        "contradicts itself: linear.image.2.bias is unknown; allowed are tensors of",
    ),
    "widths": (
        written(linear__text__1__bias=torch.ones(5).numpy()),
        r"maps are for tokens of widths \[4, 5\]; allowed: one width",
    ),
}


@pytest.mark.parametrize(("write", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_whole_file_of_maps_is_refused(
    tmp_path: Path, write: Callable[[Path], None], words: str
) -> None:
    write(tmp_path / "file")
    with pytest.raises(ValueError, match=words):
        load_maps(tmp_path / "file")


def test_maps_of_another_model_or_of_a_part_of_one_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux = Flux()
    path = saved(tmp_path / "file", maps_for(flux.pipe))
    group = DecisionGroup(ranks=(0, 1), stages=2)
    monkeypatch.setattr(PlainLayout, "decision_group", lambda *_: group)
    with pytest.raises(ValueError, match="of which each of the 2 pipeline stages holds a part"):
        flux.cache(linear_maps=path)
    monkeypatch.undo()
    for parameter in flux.transformer.time_text_embed.parameters():
        parameter.neg_()
    with pytest.raises(ValueError, match=rf"the linear_maps '{path}' was made for .*\(weights: "):
        flux.cache(linear_maps=path)
    assert hook_on(flux.transformer) is None


# ---- the option ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forecaster": "taylor"}, "needs a forecaster or token plan that takes linear maps; give"),
        ({"granularity": 3}, "does not go with granularity=3: it needs the whole stack of"),
        ({"motion_threshold": 0.1, "granularity": 3}, "does not go with granularity=3"),
        ({"merge_ratio": 0.5}, "does not go with token_plan='merging': it needs all tokens"),
        ({"use_cache": "Fb"}, "does not go with use_cache='Fb': it needs the whole stack of"),
    ],
)
def test_options_that_do_not_go_with_maps_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^linear_maps='x' {words}"):
        CacheConfig(linear_maps="x", **options)


@pytest.mark.parametrize("backend", ["Fast", "Tea", "TaylorSeer", "Ada"])
def test_maps_bring_their_forecaster(backend: str) -> None:
    config = CacheConfig(use_cache=backend, linear_maps="x").resolved()
    assert config.forecaster == "linear_taylor"
    assert CacheConfig.from_dict(config.to_dict()) == config
    assert CacheConfig(linear_maps="x", forecaster="linear").resolved().forecaster == "linear"


@pytest.mark.parametrize("forecaster", [None, "reuse", "linear", "taylor2"])
def test_with_a_split_the_forecaster_is_what_it_is_without_maps(forecaster: str | None) -> None:
    """Also where the tokens that move are merged."""
    config = CacheConfig(linear_maps="x", motion_threshold=0.1, num_stages=2, forecaster=forecaster)
    assert config.resolved().forecaster == (forecaster or "damped_taylor")


class SplitFlux(Flux):
    """Leaves out tokens at three computed steps, and skips two."""

    def latents(self, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        mask = [1, 1, 1, 0, 1, 1, 0, 1]
        self.cache(**{"motion_threshold": 1e6, "steps_mask": mask, **options})
        try:
            return self(), get_cache_statistics(self.transformer)
        finally:
            remove_cache(self.transformer)


def test_with_a_split_maps_are_for_static_tokens_at_computed_steps(tmp_path: Path) -> None:
    flux = SplitFlux()
    path = saved(tmp_path / "file", maps_for(flux.pipe))
    plain, without = flux.latents()
    mapped, found = flux.latents(linear_maps=path)
    assert mapped.isfinite().all() and not torch.equal(mapped, plain)
    assert found["spatial_approx_ratio"] == without["spatial_approx_ratio"] > 0.1
    assert found["block_approx_ratio"] == without["block_approx_ratio"] > 0.1
    assert found["estimated_flops_saved_ratio"] < without["estimated_flops_saved_ratio"]
    # No token is static: what is skipped is forecast as without a file.
    plain, _ = flux.latents(motion_threshold=0)
    assert torch.equal(flux.latents(motion_threshold=0, linear_maps=path)[0], plain)


def test_a_file_without_maps_leaves_what_the_forecaster_does_without_one(tmp_path: Path) -> None:
    """To the bit: `linear_taylor` is `taylor` then, corrected or not."""
    none = SpanMaps((0.5,), (None,), (None,))
    flux = SplitFlux()
    fitted = FittedMaps({"linear": none, "linear_taylor": none}, maps_for(flux.pipe).metadata)
    path = saved(tmp_path / "file", fitted)
    assert tensors_of(load_maps(path)) == {}
    for options in ({}, {"enable_adacorrection": True}):
        plain, _ = flux.latents(motion_threshold=None, forecaster="taylor", **options)
        found, _ = flux.latents(motion_threshold=None, linear_maps=path, **options)
        assert torch.equal(found, plain)


@pytest.mark.parametrize("name", ["linear", "linear_taylor"])
def test_statistics_count_what_maps_cost(tmp_path: Path, name: str) -> None:
    """64 image tokens and 8 of text; step 0 is computed, and 1 of 8 and 2 of 8 are the gaps."""
    flux = Flux()
    fitted = maps_for(flux.pipe)
    mask = [1, 0, 0] + [1] * (STEPS - 3)
    flux.cache(steps_mask=mask, forecaster=name)
    flux()
    plain = get_cache_statistics(flux.transformer)
    remove_cache(flux.transformer)
    flux.cache(steps_mask=mask, forecaster=name, linear_maps=saved(tmp_path / "file", fitted))
    flux()
    found = get_cache_statistics(flux.transformer)
    maps, blocks = fitted.of[name], flux.transformer
    costs = [used.multiply_adds_per_token for used in maps.image if used is not None]
    parameters = sum(
        len(listed) * sum(p.numel() for p in listed[0].parameters())
        for listed in (blocks.transformer_blocks, blocks.single_transformer_blocks)
    )
    spent = sum(costs) * 64 / 72 / parameters / STEPS
    saving = [s["estimated_flops_saved_ratio"] for s in (plain, found)]
    assert saving[0] - saving[1] == pytest.approx(spent, rel=1e-6)
    assert found["block_approx_ratio"] == plain["block_approx_ratio"] > 0
    if name == "linear":  # whose online slope goes
        slope = 2 * blocks.inner_dim * 4
        assert found["cache_bytes"] - plain["cache_bytes"] == maps.nbytes() - slope
        assert maps.nbytes() > 1000


# ---- what is recorded ---------------------------------------------------------------------------


def test_the_recorder_sees_the_stack_and_leaves_the_outputs_alone() -> None:
    flux = Flux()
    plain = flux()
    seen: list[torch.Tensor] = []
    handle = flux.transformer.norm_out.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with StackRecorder(flux.transformer, FluxAdapter, 1024) as recorder:
        assert torch.equal(flux(), plain)
        (branch,) = recorder.take(STEPS)
    for at, left in zip(branch, seen, strict=True):
        assert torch.allclose(at.inputs.hidden_states + at.residual.hidden_states, left, atol=1e-5)
        assert at.residual.encoder_hidden_states is not None
    handle.remove()
    assert not flux.transformer._forward_pre_hooks
    with StackRecorder(flux.transformer, FluxAdapter, 16) as recorder:
        flux()
        assert recorder.take(STEPS)[0][3].inputs.hidden_states.shape == (1, 16, 32)
        flux()
        with pytest.raises(ValueError, match=r"of 3 steps whose branches ran \[8\] times"):
            recorder.take(3)


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for the toy FLUX as it is."""
    path = tmp_path_factory.mktemp("maps") / "toy.safetensors"
    with torch.no_grad():
        assert fit_maps.main([*FLAGS, "--output", str(path)]) == 0
    return path


def plant(pipe: Any) -> None:
    """Make the stack's residual affine in its input."""
    model = pipe.transformer
    rng = torch.Generator().manual_seed(5)
    slope, constant = 0.5 * torch.randn(2, model.inner_dim, generator=rng)

    def passing(hidden_states: Any, encoder_hidden_states: Any, **_: Any) -> tuple[Any, Any]:
        return encoder_hidden_states, hidden_states

    def affine(hidden_states: Any, encoder_hidden_states: Any, **_: Any) -> tuple[Any, Any]:
        return encoder_hidden_states, hidden_states + hidden_states * slope + constant

    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.forward = passing
    model.single_transformer_blocks[-1].forward = affine


def test_an_affine_residual_is_found_and_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = load_pipeline(MODEL, "float32")
    plant(pipe)
    monkeypatch.setattr("xfuser_fastcache.calibration.runs.load_pipeline", lambda *_: pipe)
    path = tmp_path / "maps.safetensors"
    assert fit_maps.main([*FLAGS, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "linear_taylor" in printed and "reuse" in printed and str(path) in printed

    fitted = load_maps(path)
    for maps in fitted.of.values():
        for used in maps.image:
            assert used is not None
        # Text enters the stack alike at every step.
        assert maps.text == (None, None)

    def latents(**options: Any) -> torch.Tensor:
        apply_cache_on_transformer(
            pipe.transformer, scheduler=pipe.scheduler, steps_mask=[1, 0, 0, 1, 0, 0, 1], **options
        )
        try:
            return run(pipe, 7)
        finally:
            remove_cache(pipe.transformer)

    truth = run(pipe, 7)
    reused = (latents(forecaster="reuse") - truth).norm()
    for name in fitted.of:
        assert (latents(linear_maps=str(path), forecaster=name) - truth).norm() < 0.05 * reused


def run(pipe: Any, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS[0], num_inference_steps=steps, generator=generator, **SIZE).images


# ---- layouts ------------------------------------------------------------------------------------


@pytest.mark.gloo
def test_one_file_serves_two_ranks_and_two_files_are_refused(
    toy_maps: Path, tmp_path: Path
) -> None:
    fitted = load_maps(toy_maps)
    other = saved(
        tmp_path / "other", dataclasses.replace(fitted, metadata={**fitted.metadata, "seed": 9})
    )
    world = run_world("maps_worker.py", 2, "2", "1", str(toy_maps), other, str(tmp_path))
    pipe = load_pipeline(MODEL, "float32")
    apply_cache_on_transformer(
        pipe.transformer, scheduler=pipe.scheduler, steps_mask=MASK, linear_maps=str(toy_maps)
    )
    alone = run(pipe, TOY_STEPS)
    statistics = get_cache_statistics(pipe.transformer)
    remove_cache(pipe.transformer)
    assert torch.allclose(torch.load(tmp_path / "latents.pt"), alone, atol=1e-3)
    for report in world.values():
        assert report["error"] == "" and not report["left"]
        assert "ConsensusError" in report["two files"]
        for name in ("estimated_flops_saved_ratio", "block_approx_ratio"):
            assert report["statistics"][name] == pytest.approx(statistics[name], rel=1e-3)

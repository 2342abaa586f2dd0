"""Records of generations: inner products of what a plain hook sees, with the cache off and on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.calibrations import fitted_for
from support.flux import GUIDED, STEPS
from torch import nn

from diffusers_adapters.tiny import TINY_PIPELINES
from diffusers_adapters.tiny.flux import tiny_flux
from xfuser_fastcache import apply_cache_on_transformer, remove_cache
from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.calibration.cells import tables_of
from xfuser_fastcache.calibration.record import Recorder, Trajectory, sample
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.models.forward_layout import ForwardContract
from xfuser_fastcache.xdit.ranks import Place

MASK = [1, 1, 1, 0, 1, 0, 0, 1]
every_family = pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Model:
    """A tiny pipeline that repeats its generation."""

    def __init__(self, family: str = "flux", **call: Any):
        self.pipe, self.call = TINY_PIPELINES[family]()
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer: nn.Module = self.pipe.transformer
        self.call |= {"num_inference_steps": STEPS, **call}

    def __call__(self) -> torch.Tensor:
        return self.pipe(**{**self.call, "generator": torch.Generator().manual_seed(1)}).images

    def seen(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Generate; return what each forward pass put out and was given, in rows of its tokens."""
        found = []

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x, y = kwargs.get("hidden_states", args[0] if args else None), output[0]
            if x.dim() == 4:
                y = y[:, : x.shape[1]]
            found.append(tuple(t.double().numpy().copy() for t in (y, x)))

        handle = self.transformer.register_forward_hook(note, with_kwargs=True)
        self()
        handle.remove()
        return found

    def record(self, max_tokens: int = 4096) -> list[Trajectory]:
        with Recorder((self.transformer,), adapter_of(self.transformer), max_tokens) as recorder:
            self.latents = self()
        return recorder.take()

    def cache(self, **options: Any) -> Model:
        options = {"forecaster": "output", "scheduler": self.pipe.scheduler, **options}
        apply_cache_on_transformer(self.transformer, **options)
        return self


def gram_of(steps: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    rows = np.stack([x.ravel() for part in zip(*steps, strict=True) for x in part])
    return rows @ rows.T / rows.shape[1]


@every_family
def test_a_record_holds_the_inner_products_of_outputs_and_latents(family: str) -> None:
    model = Model(family)
    wanted = gram_of(model.seen())
    latents = model()
    (found,) = model.record()
    np.testing.assert_allclose(found.gram, wanted, rtol=1e-6, atol=1e-6)
    assert not found.skipped.any() and not found.errors.any()
    # What it looks at it leaves alone, and it is gone afterwards.
    assert torch.equal(model.latents, latents)
    assert not model.transformer._forward_hooks


def test_branches_are_recorded_apart() -> None:
    model = Model(**GUIDED)
    seen = model.seen()
    found = model.record()
    assert len(seen) == 2 * STEPS and len(found) == 2
    for branch, trajectory in enumerate(found):
        wanted = gram_of(seen[branch::2])
        np.testing.assert_allclose(trajectory.gram, wanted, rtol=1e-6, atol=1e-6)
    assert not np.allclose(found[0].gram, found[1].gram)


def test_generations_are_recorded_apart() -> None:
    model = Model()
    (wanted,) = model.record()
    with Recorder((model.transformer,), adapter_of(model.transformer), 4096) as recorder:
        for _ in range(2):
            model()
            (found,) = recorder.take()
            np.testing.assert_array_equal(found.gram, wanted.gram)
        # The first timestep of one is the last of the one before.
        model.call["num_inference_steps"] = 1
        for _ in range(2):
            model()
            assert [t.gram.shape for t in recorder.take()] == [(2, 2)]


@pytest.mark.parametrize(("max_tokens", "every"), [(64, 1), (63, 2), (32, 2), (20, 4), (1, 64)])
def test_of_a_large_picture_an_even_selection_is_recorded(max_tokens: int, every: int) -> None:
    model = Model()
    wanted = gram_of([(y[:, ::every], x[:, ::every]) for y, x in model.seen()])
    (found,) = model.record(max_tokens)
    np.testing.assert_allclose(found.gram, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("most", [8, 24, 25, 47, 48, 99])
@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_ranks_that_share_a_picture_keep_the_selection_of_one(shards: int, most: int) -> None:
    tokens = torch.arange(48.0).view(1, 48, 1)
    parts = enumerate(tokens.chunk(shards, dim=1))
    kept = [sample(part, most, Place(shard=i, shards=shards)) for i, part in parts]
    assert torch.equal(torch.cat(kept, dim=1), sample(tokens, most))
    assert sum(part.shape[1] for part in kept) <= most


@every_family
def test_on_a_cached_transformer_the_truth_is_recorded_and_the_error_of_each_skip(
    family: str,
) -> None:
    model = Model(family).cache(steps_mask=MASK)
    made = model.seen()
    latents = model()
    (found,) = model.record()
    assert torch.equal(model.latents, latents)
    assert found.skipped.tolist() == [not computed for computed in MASK]

    # What the uncached transformer makes of the latents that the cached run visited.
    truths: list[tuple[np.ndarray, np.ndarray]] = []
    contract, hook = ForwardContract(), hook_on(model.transformer)

    def truth(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = kwargs.get("hidden_states", args[0] if args else None)
        y = contract.unpack(hook.fn_ref.original_forward(*args, **kwargs)).hidden_states
        y = y.transpose(1, 2)[:, : x.shape[1]] if x.dim() == 4 else y
        truths.append((y.double().numpy(), x.double().numpy()))

    handle = model.transformer.register_forward_hook(truth, with_kwargs=True)
    model()
    handle.remove()
    np.testing.assert_allclose(found.gram, gram_of(truths), rtol=1e-6, atol=1e-6)
    for step, ((y, _), (true, _)) in enumerate(zip(made, truths, strict=True)):
        error = np.linalg.norm(y - true) / np.linalg.norm(true)
        assert found.errors[step] == pytest.approx(error, rel=1e-5, abs=1e-12)
        assert bool(found.errors[step]) == found.skipped[step]
    remove_cache(model.transformer)


@every_family
@pytest.mark.parametrize("corrected", [False, True])
def test_errors_by_the_record_are_those_of_the_forecasts_that_were_made(
    family: str, corrected: bool, tmp_path: Any
) -> None:
    """The tables' error in a skipped step's cell, from inner products, is the one of the run."""
    model = Model(family)
    model()
    plan = adapter_of(model.transformer).plan(model.pipe.scheduler)
    levels = np.array([step.noise_level for step in plan])
    fitted = fitted_for(model.pipe, STEPS, lags=4, levels=levels)
    if corrected:
        fitted.weights[:] = np.random.default_rng(0).normal(size=fitted.weights.shape) / 10
    fitted.save(tmp_path / "file")
    model.cache(calibration=str(tmp_path / "file"), steps_mask=MASK)
    (found,) = model.record()
    tables = tables_of([found], levels, fitted.weights)
    for step in np.flatnonzero(found.skipped):
        newest, before = [s for s in range(step) if MASK[s]][:-3:-1]
        error = tables.errors[0, step, step - newest - 1, newest - before]
        assert found.errors[step] == pytest.approx(error, rel=1e-4)
    assert found.skipped.sum() == 3


def test_a_branch_that_is_left_out_at_some_steps_is_refused() -> None:
    model = Model(**GUIDED)
    with Recorder((model.transformer,), adapter_of(model.transformer), 4096) as recorder:
        model()
        model.call["true_cfg_scale"] = 1.0
        model()
        with pytest.raises(ValueError, match=r"branches of \[8, 16\] steps cannot be calibrated"):
            recorder.take()
        # It forgets them all the same.
        model()
        assert len(recorder.take()) == 1


def test_nothing_recorded_is_refused() -> None:
    transformer = tiny_flux()[0].transformer
    with Recorder((transformer,), adapter_of(transformer), 4096) as recorder:
        pass
    with pytest.raises(ValueError, match=r"branches of \[\] steps cannot be calibrated on"):
        recorder.take()


@pytest.mark.parametrize("call", [lambda m, x: m(x, x, x, x[0]), lambda m, x: m(x, timestep=x[0])])
def test_the_timestep_is_read_by_place_or_name(call: Callable[..., Any]) -> None:
    class Bare(nn.Module):
        config = SimpleNamespace(in_channels=1)

        def forward(self, x: torch.Tensor, *_: Any, timestep: Any = None) -> torch.Tensor:
            return x * 2

    model, found = Bare(), []
    with Recorder((model,), adapter_of(tiny_flux()[0].transformer), 4096) as recorder:
        # In one buffer, which the next step overwrites.
        latents = torch.empty(1, 1, 1)
        for level in (3.0, 3.0, 2.0, 2.0):
            call(model, latents.fill_(level))
        found = recorder.take()
    assert [t.gram.tolist() for t in found] == [
        [[36, 24, 18, 12], [24, 16, 12, 8], [18, 12, 9, 6], [12, 8, 6, 4]]
    ] * 2

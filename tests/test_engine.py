"""The engine under a tiny FLUX in diffusers' own pipeline, on one process.

When it skips, what it hands on, and what it forgets. Spans and what is remembered of them have
tests of their own on arithmetic blocks: `test_passage.py`, and `test_stages.py` for pipelines.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.flux import GUIDED, STEPS, Flux, nan_after_step
from support.loops import Branch, alone, denoise, flags_of

from xfuser_fastcache import get_cache_statistics, remove_cache
from xfuser_fastcache.models.spans import span_of_blocks

every_granularity = pytest.mark.parametrize("granularity", ["stack", 3, "block"])
every_forecaster = pytest.mark.parametrize("forecaster", ["reuse", "linear", "taylor"])
given_or_found = pytest.mark.parametrize("scheduler", [True, False], ids=["given", "found"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def flux() -> Flux:
    return Flux()


@pytest.fixture(scope="module")
def uncached() -> torch.Tensor:
    return Flux()()


@every_granularity
@every_forecaster
def test_threshold_zero_is_bit_identical_to_no_cache(
    flux: Flux, uncached: torch.Tensor, granularity: Any, forecaster: str
) -> None:
    flux.cache(cache_ratio_threshold=0, granularity=granularity, forecaster=forecaster)
    assert torch.equal(flux(), uncached)
    assert flux.flags == [0] * STEPS


@every_granularity
@every_forecaster
def test_a_high_threshold_skips_changes_the_output_and_repeats_to_the_bit(
    flux: Flux, uncached: torch.Tensor, granularity: Any, forecaster: str
) -> None:
    flux.cache(granularity=granularity, forecaster=forecaster)
    first, decided = flux(), flux.flags
    assert any(decided)
    assert (first.shape, first.dtype, first.device) == (
        uncached.shape, uncached.dtype, uncached.device,
    )  # fmt: skip
    assert first.isfinite().all() and not torch.equal(first, uncached)
    assert torch.equal(flux(), first)
    assert flux.flags == decided
    assert get_cache_statistics(flux.transformer)["generations"] == 2


def test_after_removal_the_output_is_the_uncached_one(flux: Flux, uncached: torch.Tensor) -> None:
    flux.cache()()
    remove_cache(flux.transformer)
    assert torch.equal(flux(), uncached)


def test_bfloat16_stays_bfloat16_and_skips(flux: Flux) -> None:
    wanted = flux.to(torch.bfloat16)()
    flux.cache(cache_ratio_threshold=0)
    assert torch.equal(flux(), wanted)
    remove_cache(flux.transformer)
    found = flux.cache()()
    assert (found.dtype, bool(found.isfinite().all())) == (torch.bfloat16, True)
    assert any(flux.flags) and len(flux.flags) == STEPS


@every_granularity
@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
@pytest.mark.parametrize("in_a_row", [1, 3, 99])
def test_warm_up_last_step_and_longest_run_are_honoured(
    flux: Flux, granularity: Any, warmup: int, in_a_row: int
) -> None:
    flux.cache(granularity=granularity, num_warmup_steps=warmup, max_consecutive_skips=in_a_row)()
    spans = {"stack": 1, "block": 6}.get(granularity, granularity)
    wanted = []
    for span in range(spans):
        run, skipped = 0, []
        for step in range(STEPS):
            # The first span is measured before it is decided, the others one step later.
            measured = step >= (1 if span == 0 else 2)
            skip = measured and warmup <= step < STEPS - 1 and run < in_a_row
            run = run + 1 if skip else 0
            skipped.append(skip)
        wanted.append(skipped)
    found = [[bool(flags >> span & 1) for flags in flux.flags] for span in range(spans)]
    assert found == wanted


@given_or_found
def test_the_last_step_is_computed(flux: Flux, scheduler: bool) -> None:
    flux.cache(scheduler=scheduler, max_consecutive_skips=99)()
    assert flux.flags == [0, 0, *[1] * (STEPS - 3), 0]


@pytest.mark.parametrize(("options", "last"), [({"num_steps": STEPS}, 0), ({}, 1)])
def test_in_a_loop_of_ones_own_the_last_step_is_computed_where_it_is_known(
    options: dict[str, Any], last: int
) -> None:
    transformer = alone(max_consecutive_skips=99, **options)
    denoise(transformer, Branch(0), scheduler=None)
    assert list(flags_of(transformer).values()) == [0, 0, *[1] * (STEPS - 3), last]


def test_each_generation_goes_by_its_own_number_of_steps(flux: Flux) -> None:
    flux.cache(max_consecutive_skips=99)
    for steps in (STEPS, 5, 11):
        flux(num_inference_steps=steps)
        assert flux.flags == [0, 0, *[1] * (steps - 3), 0]


@given_or_found
def test_one_step_generations_are_generations(
    flux: Flux, uncached: torch.Tensor, scheduler: bool
) -> None:
    flux.cache(scheduler=scheduler, num_warmup_steps=0)
    first = flux(num_inference_steps=1)
    assert torch.equal(flux(num_inference_steps=1), first)
    statistics = get_cache_statistics(flux.transformer)
    assert (statistics["generations"], statistics["block_approx_ratio"]) == (2, 0)


@every_granularity
@every_forecaster
def test_a_nan_is_computed_through_counted_said_once_and_forgotten(
    flux: Flux, granularity: Any, forecaster: str, caplog: pytest.LogCaptureFixture
) -> None:
    flux.cache(granularity=granularity, forecaster=forecaster, max_consecutive_skips=99)
    healthy, decided = flux(), flux.flags
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"):
        for _ in range(2):
            found = flux(callback_on_step_end=nan_after_step(2, mended=True))
    # Step 3 sees the NaN, step 4 is measured against it; later spans learn one step later still.
    broken = (3, 4) if granularity == "stack" else (3, 4, 5)
    assert flux.flags == [0 if step in broken else f for step, f in enumerate(decided)]
    assert flux.flags[6] and decided[3]
    assert get_cache_statistics(flux.transformer)["nonfinite_steps"] == 2 * len(broken)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nonfinite_steps" in caplog.text
    assert found.isfinite().all()
    assert torch.equal(flux(), healthy)


def test_while_numbers_stay_nan_everything_is_computed(flux: Flux) -> None:
    flux.cache()(callback_on_step_end=nan_after_step(2, mended=False))
    assert flux.flags == [0, 0, 1, *[0] * (STEPS - 3)]
    assert get_cache_statistics(flux.transformer)["nonfinite_steps"] == STEPS - 3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt("stop")])
@given_or_found
@pytest.mark.parametrize("place", ["norm_out", "transformer_blocks.1.attn", "x_embedder"])
@pytest.mark.parametrize("step", [0, 3])
def test_an_exception_leaves_the_next_generation_as_a_fresh_one(
    error: BaseException, scheduler: bool, place: str, step: int
) -> None:
    # Compute every step, so that each step reaches every place.
    options = {"scheduler": scheduler, "num_warmup_steps": 4}
    fresh = Flux().cache(**options)
    wanted, flux, calls = fresh(), Flux().cache(**options), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == step + 1:
            raise error

    handle = flux.transformer.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=str(error)):
        flux()
    assert flux.engine.call is None
    handle.remove()
    assert torch.equal(flux(), wanted)
    assert flux.flags == fresh.flags
    assert {generation for generation, *_ in flux.engine.decisions.entries} == {1}


@given_or_found
@pytest.mark.parametrize("step", [0, 3, STEPS - 2])
def test_after_an_interrupted_generation_the_next_one_is_as_a_fresh_one(
    scheduler: bool, step: int
) -> None:
    fresh = Flux().cache(scheduler=scheduler)
    wanted, flux = fresh(), Flux().cache(scheduler=scheduler)

    def interrupt(pipe: Any, index: int, timestep: Any, given: Any) -> dict[str, Any]:
        pipe._interrupt = index == step
        return {}

    flux(callback_on_step_end=interrupt)
    assert len(flux.flags) == step + 1
    assert torch.equal(flux(), wanted)
    assert flux.flags == fresh.flags


def test_another_size_in_between_changes_nothing(flux: Flux) -> None:
    flux.cache()
    first, other = flux(), flux(height=64, width=96)
    assert other.shape != first.shape
    assert torch.equal(flux(), first)
    assert get_cache_statistics(flux.transformer)["generations"] == 3


def test_guidance_with_threshold_zero_is_bit_identical_to_no_cache(flux: Flux) -> None:
    wanted = flux(**GUIDED)
    flux.cache(cache_ratio_threshold=0)
    assert torch.equal(flux(**GUIDED), wanted)
    entries = flux.engine.decisions.entries
    assert entries == [(0, step, branch, 0) for step in range(STEPS) for branch in (0, 1)]


def test_guidance_keeps_an_anchor_for_each_of_its_two_calls(flux: Flux) -> None:
    flux.cache(forecaster="reuse")
    guided = flux(**GUIDED)
    one, other = (flux.engine.branches[branch].memories[0][-1].anchors[0] for branch in (0, 1))
    assert torch.equal(one.inputs.hidden_states, other.inputs.hidden_states)
    assert not torch.equal(one.residual.hidden_states, other.residual.hidden_states)
    statistics = get_cache_statistics(flux.transformer)
    assert (statistics["steps"], statistics["collectives"]) == (STEPS, 2 * STEPS)
    assert statistics["block_approx_ratio"] > 0
    assert torch.equal(flux(**GUIDED), guided)


@every_granularity
def test_what_the_model_adds_between_blocks_is_counted_once(flux: Flux, granularity: Any) -> None:
    transformer = flux.cache(granularity=granularity, forecaster="reuse").transformer
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 16, generator=generator)
    old, new = (torch.randn(6, 1, 16, 32, generator=generator) for _ in range(2))
    last: dict[str, torch.Tensor] = {}
    transformer.norm_out.register_forward_pre_hook(lambda _, args: last.update(x=args[0]))

    def step(level: float, samples: torch.Tensor) -> torch.Tensor:
        transformer(
            hidden_states=latents,
            encoder_hidden_states=flux.call["prompt_embeds"],
            pooled_projections=flux.call["pooled_prompt_embeds"],
            timestep=torch.tensor([level]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            controlnet_block_samples=list(samples[:2]),
            controlnet_single_block_samples=list(samples[2:]),
        )
        return last["x"]

    step(0.9, old)
    computed = step(0.8, old)
    skipped = step(0.7, new)
    spans = span_of_blocks(6, granularity)
    assert flux.flags == [0, 0, 2 ** (spans[-1] + 1) - 1]
    # Within a span the anchor's residual holds the old additions; after it come the new ones.
    ends = [i for i in range(6) if i == 5 or spans[i + 1] != spans[i]]
    torch.testing.assert_close(skipped, computed + (new - old)[ends].sum(0))


@every_forecaster
def test_removal_frees_every_anchor_at_once(flux: Flux, forecaster: str) -> None:
    """Without the garbage collector, which may not come for long while a GPU's memory is full."""
    flux.cache(granularity=3, forecaster=forecaster)()
    anchors = [
        weakref.ref(tensor)
        for local in flux.engine.branches.values()
        for patches in local.memories.values()
        for memory in patches.values()
        for anchor in memory.anchors
        for tensor in (anchor.inputs.hidden_states, anchor.residual.hidden_states)
    ]
    assert anchors and all(anchor() is not None for anchor in anchors)
    gc.disable()
    try:
        remove_cache(flux.transformer)
        assert [anchor() for anchor in anchors] == [None] * len(anchors)
    finally:
        gc.enable()

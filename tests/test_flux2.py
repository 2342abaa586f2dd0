"""FLUX.2 in plain diffusers: what is measured of each version, and text and sizes that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Flux2KleinKVPipeline
from support.counted import counted_tokens
from support.families import drawing, made

from diffusers_adapters.flux2 import Flux2Adapter
from diffusers_adapters.tiny.flux2 import tiny_flux2
from diffusers_adapters.tiny.model import picture
from xfuser_fastcache import (
    apply_cache_on_transformer,
    get_cache_statistics,
    get_cache_trace,
    remove_cache,
)

pytestmark = pytest.mark.usefixtures("without_gradients")
STEPS, TOKENS = 7, 64
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "spans": {"granularity": 3, "forecaster": "linear"},
    "output": {"forecaster": "output"},
    "data": {"forecaster": "data"},
    "split": {"motion_threshold": 0.3},
    "merge": {"enable_token_merge": True},
    "first block": {"use_cache": "Fb"},
}
# What others than the first have of their own: a second call a step, keys that are kept.
FEW_WAYS = ("default", "spans", "output")
SLOW = pytest.mark.slow


def drawn(name: str) -> tuple[Any, Any]:
    """As `made`, and the pipeline that encodes pictures to edit once."""
    if name != "klein-kv":
        return made(name, STEPS)
    pipe, call = tiny_flux2(pipeline_class=Flux2KleinKVPipeline, is_distilled=True)
    return pipe, drawing(pipe, {**call, "image": picture(64), "num_inference_steps": STEPS})


@pytest.mark.parametrize(
    "name", ["flux2-edit", "klein", "klein-kv", pytest.param("flux2", marks=SLOW)]
)
def test_only_noise_is_measured_and_nothing_changes_at_threshold_0(name: str) -> None:
    pipe, generate = drawn(name)
    control = generate()
    for way in FEW_WAYS if name.startswith("klein") else WAYS:
        options = WAYS[way]
        for threshold in (0.0, 12.0):
            apply_cache_on_transformer(
                pipe.transformer, scheduler=pipe.scheduler, cache_ratio_threshold=threshold,
                **options,
            )  # fmt: skip
            with counted_tokens() as seen:
                found = generate()
            statistics = get_cache_statistics(pipe.transformer)
            remove_cache(pipe.transformer)
            exact = threshold == 0 and way not in ("split", "merge")  # which narrow computed steps
            assert torch.equal(found, control) == exact, way
            assert found.isfinite().all(), way
            assert (statistics["block_approx_ratio"] > 0) == (threshold > 0), way
            assert (statistics["clock"], statistics["recomputed"]) == ("scheduler", 0), way
            assert (statistics["steps"], statistics["generations"]) == (STEPS, 1), way
            assert seen == (set() if way == "first block" else {TOKENS}), way
    assert torch.equal(generate(), control)


@pytest.mark.parametrize("name", ["flux2-edit", pytest.param("klein", marks=SLOW)])
def test_other_sizes_and_texts_in_between_change_nothing(name: str) -> None:
    pipe, generate = drawn(name)
    long, short = torch.randn(1, 11, 32), torch.randn(1, 5, 32)
    alone = {}
    for text in (long, short):
        apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=12.0, granularity=3)
        alone[text] = generate(prompt_embeds=text)
        remove_cache(pipe.transformer)
    apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=12.0, granularity=3)
    first = generate()
    for text in (long, short):
        assert torch.equal(generate(prompt_embeds=text), alone[text])
    generate(height=96, width=160, num_inference_steps=STEPS - 2)
    assert torch.equal(generate(), first)


def test_budgets_are_kept_exactly() -> None:
    pipe, generate = made("klein", STEPS)
    for forecaster in ("data", "damped_taylor"):
        apply_cache_on_transformer(pipe.transformer, computed_steps=4, forecaster=forecaster)
        generate()
        found = get_cache_trace(pipe.transformer)
        remove_cache(pipe.transformer)
        for branch in {row["branch"] for row in found}:
            skipped = [
                row for row in found if (row["branch"], row["decision"]) == (branch, "skipped")
            ]
            assert len(skipped) == STEPS - 4


def test_tea_measures_what_the_first_block_s_attention_is_given() -> None:
    pipe, generate = made("flux2-edit", STEPS)
    block = pipe.transformer.transformer_blocks[0]
    given: list[torch.Tensor] = []
    modulated: list[torch.Tensor] = []
    block.attn.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["hidden_states"]), with_kwargs=True
    )
    block.register_forward_pre_hook(
        lambda module, args, kwargs: modulated.append(
            Flux2Adapter.modulated_input(module, args, kwargs)
        ),
        with_kwargs=True,
    )
    generate(num_inference_steps=2)
    assert len(given) == 2 and given[0].shape == (1, TOKENS + 16, 32)
    for one, other in zip(given, modulated, strict=True):
        assert torch.allclose(one, other, atol=1e-6)

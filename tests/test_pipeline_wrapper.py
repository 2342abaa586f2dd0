"""FastCache's pipeline wrapper on tiny diffusers pipelines, in one process and without xfuser."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import apply_cache_on_transformer, get_cache_trace
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.xdit.pipeline import xFuserFastCachePipelineWrapper

STEPS = 8
OFTEN = {"cache_ratio_threshold": 3.0}


def build(model: str = "flux") -> tuple[Any, dict[str, Any]]:
    pipe, call = TINY_PIPELINES[model]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": STEPS}


def generate(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    return pipe(**{**call, "generator": torch.Generator().manual_seed(0)}).images


@pytest.mark.parametrize("model", ["flux", "sd3", "pixart", "pixart-sigma"])
def test_enable_skips_and_disable_restores_to_the_bit(model: str) -> None:
    pipe, call = build(model)
    control = generate(pipe, call)
    wrapper = xFuserFastCachePipelineWrapper(pipe)
    assert torch.equal(generate(wrapper, call), control)

    wrapper.enable_fastcache(**OFTEN)
    cached = generate(wrapper, call)
    statistics = wrapper.get_cache_statistics()
    assert statistics["use_cache"] == "Fast"
    assert 0 < statistics["block_approx_ratio"] < 1
    assert statistics["spatial_approx_ratio"] == 0
    assert (statistics["steps"], statistics["generations"]) == (STEPS, 1)
    assert not torch.equal(cached, control)

    wrapper.reset_cache_statistics()
    assert wrapper.get_cache_statistics()["steps"] == 0
    wrapper.disable_fastcache()
    assert torch.equal(generate(wrapper, call), control)
    assert hook_on(pipe.transformer) is None
    wrapper.disable_fastcache()


def test_enabling_again_takes_the_new_options_and_a_wrong_one_leaves_the_old() -> None:
    pipe, call = build()
    wrapper = xFuserFastCachePipelineWrapper(pipe)
    wrapper.enable_fastcache(**OFTEN)
    generate(wrapper, call)
    wrapper.enable_fastcache(use_cache="TaylorSeer", cache_interval=2)
    assert wrapper.get_cache_statistics()["use_cache"] == "TaylorSeer"
    assert wrapper.get_cache_statistics()["steps"] == 0
    with pytest.raises(ValueError, match="unknown cache option 'treshold'"):
        wrapper.enable_fastcache(treshold=1)
    assert wrapper.get_cache_statistics()["use_cache"] == "TaylorSeer"


def test_it_equals_the_call_on_the_transformer() -> None:
    pipe, call = build()
    wrapper = xFuserFastCachePipelineWrapper(pipe)
    wrapper.enable_fastcache(**OFTEN)
    wrapped = generate(wrapper, call)
    wrapper.disable_fastcache()
    apply_cache_on_transformer(pipe.transformer, scheduler=pipe.scheduler, **OFTEN)
    assert torch.equal(generate(pipe, call), wrapped)


def test_everything_else_is_the_pipelines() -> None:
    pipe, _ = build()
    wrapper = xFuserFastCachePipelineWrapper(pipe)
    assert isinstance(wrapper, FluxPipeline) and isinstance(wrapper, xFuserFastCachePipelineWrapper)
    assert wrapper.config is pipe.config and wrapper.components.keys() == pipe.components.keys()
    assert wrapper.device == pipe.device
    assert {"enable_fastcache", "encode_prompt", "vae_scale_factor"} <= set(dir(wrapper))
    assert repr(pipe) in repr(wrapper)
    wrapper.vae_scale_factor = 16
    assert pipe.vae_scale_factor == 16
    wrapper.mark = 1
    del wrapper.mark
    assert not hasattr(pipe, "mark") and not hasattr(wrapper, "mark")
    assert wrapper.to(torch.float64) is wrapper
    assert pipe.transformer.dtype == torch.float64
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapper.no_such_thing
    assert copy.copy(wrapper).transformer is pipe.transformer


def test_the_scheduler_reaches_the_cache_also_when_it_is_exchanged() -> None:
    """With it, the last step is known and computed, and one-step generations are told apart."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe, call = build()
    wrapper = xFuserFastCachePipelineWrapper(pipe)
    wrapper.enable_fastcache(**OFTEN)

    def last_step_is_forced() -> bool:
        generate(wrapper, call)
        (last,) = [e for e in get_cache_trace(pipe.transformer) if e["step"] == STEPS - 1]
        return last["decision"] == "forced" and "last" in last["reason"]

    assert last_step_is_forced()
    wrapper.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert last_step_is_forced()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert last_step_is_forced()
    wrapper.reset_cache_statistics()
    for _ in range(3):
        generate(wrapper, {**call, "num_inference_steps": 1})
    assert wrapper.get_cache_statistics()["generations"] == 3


def test_another_transformer_takes_the_cache_over() -> None:
    pipe, call = build()
    other, _ = TINY_PIPELINES["flux"](seed=1)
    before = pipe.transformer
    wrapper = xFuserFastCachePipelineWrapper(pipe)
    wrapper.enable_fastcache(**OFTEN)
    wrapper.transformer = other.transformer
    assert hook_on(before) is None and pipe.transformer is other.transformer
    generate(wrapper, call)
    assert wrapper.get_cache_statistics()["block_approx_ratio"] > 0


def test_what_is_off_and_what_has_no_transformer_is_named() -> None:
    pipe, _ = build()
    wrapper = xFuserFastCachePipelineWrapper(pipe)
    for call in (wrapper.get_cache_statistics, wrapper.reset_cache_statistics):
        with pytest.raises(ValueError, match=r"the cache is off; call enable_fastcache\(\) first"):
            call()
    with pytest.raises(TypeError, match="object has no transformer to cache"):
        xFuserFastCachePipelineWrapper(object())


def test_a_cache_does_not_keep_a_deleted_pipeline_alive() -> None:
    pipe, call = build()
    wrapper = xFuserFastCachePipelineWrapper(pipe)
    wrapper.enable_fastcache(**OFTEN)
    transformer, alive = pipe.transformer, weakref.ref(pipe)
    generate(wrapper, call)
    gc.collect()
    gc.disable()
    try:
        del pipe, wrapper
        assert alive() is None
    finally:
        gc.enable()
    # Its transformer still runs, and its generations are told apart by their noise levels.
    other, _ = build()
    other.transformer = transformer
    generate(other, call)

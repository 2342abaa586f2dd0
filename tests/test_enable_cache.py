"""diffusers' own way to a cache: enable_cache, disable_cache and is_cache_enabled take our configs.

CPU, tiny pipelines; the layers beneath are tested in `test_hooks.py`. What a program sees before
and after `uninstall` runs in an interpreter of its own.
"""

from __future__ import annotations

import inspect
import json
import logging
import textwrap
import types
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin
from support.flux import Flux
from support.worlds import python
from torch import nn

import xfuser_fastcache as fc
from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.enable_cache import PATCHES
from xfuser_fastcache.plugins import ADAPTERS, BUILT_IN, GATES, loaded

CONFIGS = {name: getattr(fc, name) for name in fc.__all__ if name.endswith("CacheConfig")}
del CONFIGS["CacheConfig"]
FAMILIES = ("flux", "sd3", "pixart", "z-image")


def hooks_of(module: nn.Module) -> list[str]:
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_by_enable_cache_draws_as_by_apply_and_leaves_nothing(family: str) -> None:
    pipe, call = TINY_PIPELINES[family]()
    pipe.set_progress_bar_config(disable=True)
    transformer = pipe.transformer

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipe(**{**call, "num_inference_steps": 6, "generator": generator}).images

    def attributes() -> dict[str, set[str]]:
        return {name: set(vars(part)) for name, part in transformer.named_modules()}

    full = draw()
    before = attributes()  # a pipeline's own `cache_context` leaves something, too
    fc.apply_cache_on_pipeline(pipe, computed_steps=3)
    applied = draw()
    assert transformer.is_cache_enabled
    fc.remove_cache_from_pipeline(pipe)
    assert not transformer.is_cache_enabled

    transformer.enable_cache(fc.FastCacheConfig(computed_steps=3))
    assert transformer.is_cache_enabled
    assert torch.equal(draw(), applied) and not torch.equal(applied, full)
    statistics = fc.get_cache_statistics(transformer)
    assert (statistics["steps"], statistics["block_approx_ratio"]) == (6, 0.5)
    transformer.disable_cache()
    assert not transformer.is_cache_enabled
    assert attributes() == before
    assert torch.equal(draw(), full)


def test_every_family_has_the_methods_and_every_backend_a_class() -> None:
    lacking = [
        adapter.model_class
        for adapter in loaded(ADAPTERS).values()
        if not hasattr(getattr(diffusers, adapter.model_class), "enable_cache")
    ]
    assert lacking == []
    assert {config().use_cache for config in CONFIGS.values()} == set(BUILT_IN[GATES.group])
    assert not set(CONFIGS) & set(dir(diffusers))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_class_puts_its_backend_on(name: str) -> None:
    flux = Flux()
    config = CONFIGS[name](num_warmup_steps=2)
    flux.transformer.enable_cache(config)
    flux()
    assert flux.engine.config.use_cache == config.use_cache
    # Ranks with either spelling agree.
    plain = CacheConfig(use_cache=config.use_cache, num_warmup_steps=2)
    assert config.digest() == plain.digest()
    flux.transformer.disable_cache()
    with pytest.raises(ValueError, match="use_cache='Other' is not allowed; give"):
        CONFIGS[name](use_cache="Other")


def test_enabling_twice_is_refused_in_each_order() -> None:
    flux = Flux()
    ours, theirs = fc.FastCacheConfig(computed_steps=4), FirstBlockCacheConfig(threshold=0.1)
    transformer = flux.transformer
    for first, second in ((ours, ours), (ours, theirs), (theirs, ours)):
        transformer.enable_cache(first)
        with pytest.raises(ValueError, match=f"already.*{type(first).__name__}"):
            transformer.enable_cache(second)
        transformer.disable_cache()
        assert not transformer.is_cache_enabled and hooks_of(transformer) == []
    flux.cache()
    with pytest.raises(ValueError, match="already"):
        transformer.enable_cache(theirs)


def test_configs_of_diffusers_go_on_to_diffusers() -> None:
    flux = Flux()
    full = flux()
    flux.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    block = flux.transformer.transformer_blocks[0]
    assert not torch.equal(flux(), full) and "fbc_leader_block_hook" in hooks_of(block)
    flux.transformer.disable_cache()
    flux.transformer.enable_cache(TaylorSeerCacheConfig())
    assert type(flux.transformer._cache_config) is TaylorSeerCacheConfig
    flux.transformer.disable_cache()
    assert torch.equal(flux(), full)
    with pytest.raises(ValueError, match="is not supported"):
        flux.transformer.enable_cache(object())


def test_a_model_without_the_mixin_takes_ours_alone(caplog: pytest.LogCaptureFixture) -> None:
    transformer = TINY_PIPELINES["sd3"]()[0].transformer
    assert not isinstance(transformer, CacheMixin)
    with pytest.raises(ValueError, match="FirstBlockCacheConfig is not for SD3Transformer2DModel"):
        transformer.enable_cache(FirstBlockCacheConfig())
    transformer.disable_cache()
    assert not transformer.is_cache_enabled


def test_disable_takes_off_whatever_is_on(caplog: pytest.LogCaptureFixture) -> None:
    flux = Flux()
    flux.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"):
        flux.cache()
    assert [r.message for r in caplog.records if r.message.startswith("Two caches")]
    flux.transformer.disable_cache()
    assert not flux.transformer.is_cache_enabled
    assert hooks_of(flux.transformer) == []


def test_cache_context_and_the_registry_tell_the_truth() -> None:
    flux = Flux()
    flux.transformer.enable_cache(fc.FastCacheConfig(computed_steps=4))
    assert hooks_of(flux.transformer) == ["xfuser_fastcache"]
    assert "xfuser_fastcache" in repr(HookRegistry.check_if_exists_or_initialize(flux.transformer))
    with flux.transformer.cache_context("cond"):
        pass
    flux()
    assert {entry["branch"] for entry in fc.get_cache_trace(flux.transformer)} == {0}
    parameters = inspect.signature(CacheMixin.enable_cache).parameters
    assert list(parameters) == ["self", "config"]
    assert "apply_first_block_cache" in inspect.getsource(CacheMixin.enable_cache)
    flux.transformer.disable_cache()
    assert hooks_of(flux.transformer) == []


def test_another_diffusers_still_imports(caplog: pytest.LogCaptureFixture) -> None:
    for name, patch in PATCHES.items():
        patch(types.ModuleType(name))
    (message,) = (record.getMessage() for record in caplog.records)
    assert "use apply_cache_on_transformer" in message


def fresh(code: str) -> Any:
    """What `code` prints last, as JSON, in an interpreter of its own."""
    done = python("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_works_after_the_import_and_is_gone_after_uninstall() -> None:
    changed, again, left, lacking, said = fresh(
        f"""
        import importlib, json

        def snapshot():
            return {{
                f"{{value.__name__}}.{{inner}}": id(part)
                for name in {sorted(PATCHES)}
                for value in vars(importlib.import_module(name)).values()
                if isinstance(value, type) and value.__module__ == name
                for inner, part in vars(value).items()
            }}

        plain = snapshot()
        import xfuser_fastcache
        from xfuser_fastcache.xdit.integration import install, uninstall
        patched = snapshot()
        install()
        again = snapshot()
        uninstall()
        from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
        try:
            model = FluxTransformer2DModel(
                num_layers=0, num_single_layers=0, attention_head_dim=16, num_attention_heads=1,
                axes_dims_rope=(4, 4, 8))
            model.enable_cache(xfuser_fastcache.FastCacheConfig())
        except ValueError as error:
            said = str(error)
        changed = sorted(key for key in patched if patched[key] != plain.get(key))
        lacking = not hasattr(SD3Transformer2DModel, "enable_cache")
        print(json.dumps([changed, again == patched, snapshot() == plain, lacking, said]))
        """
    )
    names = ("disable_cache", "enable_cache")
    given = ("_cache_config", "disable_cache", "enable_cache", "is_cache_enabled")
    models = (
        "ConsisIDTransformer3DModel",
        "HunyuanDiT2DModel",
        "Ideogram4Transformer2DModel",
        "Krea2Transformer2DModel",
        "Lumina2Transformer2DModel",
        "PixArtTransformer2DModel",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "ZImageTransformer2DModel",
    )
    mixin = [f"CacheMixin.{name}" for name in names]
    assert changed == sorted(mixin + [f"{model}.{name}" for model in models for name in given])
    assert (again, left, lacking) == (True, True, True)
    assert "is not supported" in said


def test_on_a_wrapper_of_xfuser_the_cache_stands_on_the_wrapper() -> None:
    on_wrapper, on_model, said, left = fresh(
        """
        import json, sys
        sys.path[:0] = ["tests"]
        from diffusers_adapters.tiny.flux import tiny_flux
        import xfuser_fastcache as fc
        from xfuser_fastcache.hooks import hook_on
        from xfuser_fastcache.xdit.own_caches import _groups_of_one

        with _groups_of_one():
            from xfuser.model_executor.models.transformers import transformer_flux
            pipe, _ = tiny_flux()
            wrapper = transformer_flux.xFuserFluxTransformer2DWrapper(pipe.transformer)
            wrapper.enable_cache(fc.FastCacheConfig(computed_steps=3, num_steps=6))
            found = hook_on(wrapper) is not None, hook_on(wrapper.module) is not None
            try:
                wrapper.module.disable_cache()
            except ValueError as error:
                said = str(error)
            wrapper.disable_cache()
            print(json.dumps([*found, said, wrapper.is_cache_enabled]))
        """
    )
    assert (on_wrapper, on_model, left) == (True, False, False)
    assert "with the transformer that the pipeline calls" in said

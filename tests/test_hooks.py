"""Putting a cache on a transformer and taking it off: clear errors, and nothing left behind."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, ModelHook
from torch import nn

import diffusers_adapters
from diffusers_adapters.tiny.flux import tiny_flux
from xfuser_fastcache import (
    CacheConfig,
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
    reset_cache_statistics,
)
from xfuser_fastcache.hooks import hook_on


@pytest.fixture
def transformer() -> nn.Module:
    return tiny_flux()[0].transformer


def forward_kwargs(timestep: float = 0.5) -> dict[str, Any]:
    """Return the arguments of one forward of the tiny FLUX transformer."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([timestep]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(4, 3),
    }


def dictionaries(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return every submodule's own attributes, each by identity."""
    return {
        name: {key: id(value) for key, value in vars(child).items()}
        for name, child in module.named_modules()
    }


@torch.no_grad()
def output(transformer: nn.Module, **given: Any) -> torch.Tensor:
    return transformer(**forward_kwargs(**given), return_dict=False)[0]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            lambda: nn.Linear(2, 2),
            "Linear is not supported by the cache; only .*FluxTransformer2DModel, .* are",
        ),
        (lambda: tiny_flux()[0], "FluxPipeline is not supported .* Pass the pipeline's trans"),
    ],
    ids=["a layer", "a pipeline"],
)
def test_what_is_no_supported_transformer_is_refused_by_name(target: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        apply_cache_on_transformer(target())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_stepz": 3}, ValueError, "unknown cache option 'num_stepz'"),
        ({"use_cache": "Slow"}, ValueError, "unknown cache backend 'Slow'; known: Fast"),
        ({"num_steps": 2.5}, TypeError, "num_steps=2.5 is not allowed"),
        ({"shadow_audit": 2}, ValueError, "shadow_audit=2 is not allowed; give 0 <= number <= 1"),
        (
            {"config": CacheConfig(), "num_steps": 3, "granularity": 2},
            ValueError,
            "either config or single options, not both: num_steps, granularity",
        ),
        (
            {"return_hidden_states_first": True},
            ValueError,
            "return_hidden_states_first=True does not fit transformer_blocks, which returns "
            "encoder_hidden_states then hidden_states",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_refused_option_leaves_the_transformer_alone(
    transformer: nn.Module, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    before = dictionaries(transformer)
    with pytest.raises(error, match=words):
        apply_cache_on_transformer(transformer, **options)
    assert dictionaries(transformer) == before


def test_a_cached_transformer_is_not_cached_twice(transformer: nn.Module) -> None:
    apply_cache_on_transformer(transformer, num_steps=3)
    with pytest.raises(ValueError, match="is cached already; call remove_cache"):
        apply_cache_on_transformer(transformer)
    assert hook_on(transformer).engine.config.num_steps == 3


@pytest.mark.parametrize("ask", [remove_cache, get_cache_statistics, reset_cache_statistics])
def test_asking_an_uncached_transformer_says_what_to_call(transformer: nn.Module, ask: Any) -> None:
    with pytest.raises(ValueError, match="no cache on this FluxTransformer2DModel; call apply_"):
        ask(transformer)


@pytest.mark.parametrize(
    "options",
    [{"num_steps": 3, "rel_l1_thresh": 0.2, "return_hidden_states_first": False}, {}],
)
def test_options_and_a_config_of_the_same_options_are_one(
    transformer: nn.Module, options: dict[str, Any]
) -> None:
    config = CacheConfig.from_dict(options).resolved()
    assert apply_cache_on_transformer(transformer, **options) is transformer
    assert hook_on(transformer).engine.config == config
    assert remove_cache(transformer) is transformer
    assert apply_cache_on_transformer(transformer, config=config) is transformer
    assert hook_on(transformer).engine.config == config


def test_both_packages_offer_the_same_function() -> None:
    assert diffusers_adapters.apply_cache_on_transformer is apply_cache_on_transformer


def test_removing_restores_every_module_exactly(transformer: nn.Module) -> None:
    before, wanted = dictionaries(transformer), output(transformer)
    for _ in range(2):
        apply_cache_on_transformer(transformer, cache_ratio_threshold=1e6, num_warmup_steps=1)
        skipped = [output(transformer, timestep=t) for t in (0.7, 0.5)][-1]
        assert not torch.equal(skipped, wanted)
        remove_cache(transformer)
        assert dictionaries(transformer) == before
        assert torch.equal(output(transformer), wanted)


def test_nothing_of_ours_is_left_after_diffusers_has_looked_for_hooks(
    transformer: nn.Module,
) -> None:
    apply_cache_on_transformer(transformer)
    with transformer.cache_context("cond"):
        output(transformer)
    remove_cache(transformer)
    with transformer.cache_context("cond"):
        output(transformer)
    for name, module in transformer.named_modules():
        if name:
            assert not {"_diffusers_hook", "forward"} & set(vars(module)), name
    assert vars(transformer)["_diffusers_hook"].hooks == {}


def test_state_dict_keys_and_module_names_do_not_change(transformer: nn.Module) -> None:
    keys, names = list(transformer.state_dict()), [n for n, _ in transformer.named_modules()]
    apply_cache_on_transformer(transformer)
    assert list(transformer.state_dict()) == keys
    assert [name for name, _ in transformer.named_modules()] == names


# ---- copies and files ---------------------------------------------------------------------------


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("forecaster", ["taylor", "output"])
def test_a_cached_transformer_is_not_copied_and_says_what_to_do(
    transformer: nn.Module, copied: Any, forecaster: str
) -> None:
    wanted = output(transformer)
    apply_cache_on_transformer(transformer, forecaster=forecaster, num_warmup_steps=1)
    output(transformer)
    with pytest.raises(TypeError, match="carries a step cache.* Call remove_cache"):
        copied(transformer)
    # The cache goes on, and after it the transformer is copied as any other.
    assert get_cache_statistics(transformer)["steps"] == 1
    output(transformer, timestep=0.4)
    remove_cache(transformer)
    assert torch.equal(output(copied(transformer)), wanted)


def test_a_copied_block_says_so_too(transformer: nn.Module) -> None:
    apply_cache_on_transformer(transformer, forecaster="damped_taylor")
    with pytest.raises(TypeError, match="Call remove_cache"):
        copy.deepcopy(transformer.transformer_blocks[0])


def test_a_cached_transformer_is_saved_and_loaded_without_its_cache(
    transformer: nn.Module, tmp_path: Path
) -> None:
    wanted = output(transformer)
    apply_cache_on_transformer(transformer)
    output(transformer)
    transformer.save_pretrained(tmp_path)
    loaded = type(transformer).from_pretrained(tmp_path, local_files_only=True)
    assert hook_on(loaded) is None
    assert torch.equal(output(loaded), wanted)
    assert copy.deepcopy(transformer.state_dict()).keys() == loaded.state_dict().keys()


# ---- hooks of others ----------------------------------------------------------------------------


class Doubling(ModelHook):
    """Somebody else's hook."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return (output[0] * 2,)


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_hooks_of_others_stay_when_the_cache_goes(transformer: nn.Module, first: bool) -> None:
    wanted = output(transformer) * 2

    def register() -> None:
        HookRegistry.check_if_exists_or_initialize(transformer).register_hook(Doubling(), "theirs")

    if first:
        register()
    apply_cache_on_transformer(transformer)
    if not first:
        register()
    assert torch.equal(output(transformer), wanted)
    remove_cache(transformer)
    assert torch.equal(output(transformer), wanted)
    vars(transformer)["_diffusers_hook"].remove_hook("theirs")
    assert torch.equal(output(transformer), wanted / 2)


def test_a_forward_that_somebody_replaced_is_called_and_restored(transformer: nn.Module) -> None:
    original, calls = transformer.forward, []

    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    transformer.forward = replaced  # type: ignore[method-assign]
    apply_cache_on_transformer(transformer)
    output(transformer)
    remove_cache(transformer)
    assert (calls, vars(transformer)["forward"]) == ([1], replaced)


def test_blocks_outside_of_the_hooked_transformer_run_uncached_and_warn_once(
    transformer: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = output(transformer)
    apply_cache_on_transformer(transformer, cache_ratio_threshold=1e6, num_warmup_steps=0)
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"), torch.no_grad():
        for _ in range(2):
            bypassed = hook_on(transformer).fn_ref.original_forward(
                **forward_kwargs(), return_dict=False
            )[0]
            assert torch.equal(bypassed, wanted)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "outside of its transformer's hooked forward" in caplog.text
    assert get_cache_statistics(transformer)["steps"] == 0


def test_two_cached_transformers_of_one_class_do_not_touch_each_other() -> None:
    def cached(seed: int) -> nn.Module:
        module = tiny_flux(seed)[0].transformer
        return apply_cache_on_transformer(module, cache_ratio_threshold=1e6, num_warmup_steps=1)

    timesteps = (0.9, 0.7, 0.5)
    alone = [[output(module, timestep=t) for t in timesteps] for module in map(cached, (0, 1))]
    one, other = cached(0), cached(1)
    together = [(output(one, timestep=t), output(other, timestep=t)) for t in timesteps]
    for index, separate in enumerate(alone):
        assert all(torch.equal(a, b[index]) for a, b in zip(separate, together, strict=True))
    statistics = get_cache_statistics(other)
    remove_cache(one)
    assert get_cache_statistics(other) == statistics
    assert (statistics["steps"], statistics["block_approx_ratio"]) == (3, pytest.approx(2 / 3))


def test_a_cache_of_diffusers_beside_ours_is_named_once(
    transformer: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[str]:
        return [r.message for r in caplog.records if r.message.startswith("Two caches")]

    def ours() -> None:
        apply_cache_on_transformer(transformer, cache_ratio_threshold=0.0)

    def theirs() -> None:
        transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))

    def call() -> None:
        with transformer.cache_context("cond"):
            transformer(**forward_kwargs())

    theirs()
    assert said() == []
    ours()
    call()
    call()
    (message,) = said()
    assert "Fast of xfuser_fastcache" in message and "(FirstBlockCacheConfig)" in message
    assert "FluxTransformer2DModel" in message and "disable_cache()" in message
    remove_cache(transformer)
    transformer.disable_cache()
    ours()
    call()
    assert len(said()) == 1
    # Put on by either door, ours is a cache that is on already.
    with pytest.raises(ValueError, match="has already been enabled with .*CacheConfig"):
        theirs()
    remove_cache(transformer)
    theirs()
    ours()
    assert len(said()) == 2

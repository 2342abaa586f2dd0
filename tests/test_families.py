"""SANA, Lumina-Image 2.0, HunyuanDiT, LTX-2, Latte and Ideogram-4 in plain diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from support.counted import counted_tokens
from support.xdit_runs import latents_of

from diffusers_adapters.ltx2 import LTX2Adapter
from diffusers_adapters.lumina2 import Lumina2Adapter
from diffusers_adapters.registry import adapters
from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import (
    apply_cache_on_transformer,
    get_cache_statistics,
    get_cache_trace,
    remove_cache,
)
from xfuser_fastcache.assembly import Request, adapter_of
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.models.token_layout import TokenCounts

STEPS = 6


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(name: str, **sizes: Any) -> tuple[Any, Callable[..., torch.Tensor]]:
    """Return a tiny pipeline, and what draws with it, with changed arguments."""
    pipe, call = TINY_PIPELINES[name](**sizes)
    pipe.set_progress_bar_config(disable=True)

    def generate(**changed: Any) -> torch.Tensor:
        noise = torch.Generator().manual_seed(1)
        given = {**call, "num_inference_steps": STEPS, "generator": noise, **changed}
        return latents_of(pipe(**given))

    return pipe, generate


# Image tokens of the tiny pipeline's forward passes, and pixels of its latents in one.
SIZES = {
    "sana": ({2 * 64}, 1),
    "lumina2": ({64}, 4),
    "hunyuan-dit": ({2 * 64}, 4),
    "ltx2": ({2 * 32, 32}, 1),
    "latte": ({2 * 4 * 64}, 4),
    **({"ideogram4": ({64}, 1)} if "ideogram4" in TINY_PIPELINES else {}),
}
WAYS: dict[str, dict[str, Any]] = {
    "stack": {},
    "spans": {"granularity": 2, "forecaster": "linear"},
    "output": {"forecaster": "output"},
    "split": {"motion_threshold": 0.3},
}


def in_spans(name: str, way: str) -> bool:
    return "granularity" in WAYS[way] and name == "hunyuan-dit"


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in SIZES for way in WAYS if not in_spans(name, way)]
)
def test_the_image_alone_is_measured_and_nothing_changes_at_threshold_0(
    name: str, way: str
) -> None:
    pipe, generate = made(name)
    control = generate()
    tokens, pixels = SIZES[name]
    for threshold in (0.0, 12.0):
        options = {"forecaster": "damped_taylor", **WAYS[way]}
        apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=threshold, **options)
        with counted_tokens() as seen:
            found = generate()
        statistics = get_cache_statistics(pipe.transformer)
        assert torch.equal(generate(), found)
        remove_cache(pipe.transformer)
        assert found.isfinite().all()
        assert torch.equal(found, control) == (threshold == 0)
        assert (statistics["block_approx_ratio"] > 0) == (threshold > 0)
        # DDIM counts no steps.
        assert statistics["clock"] == ("plan" if name == "latte" else "scheduler")
        assert statistics["recomputed"] == 0
        assert seen == {of_pass * (pixels if way == "output" else 1) for of_pass in tokens}
        assert statistics["spatial_approx_ratio"] == 0  # none of them can leave tokens out
    assert torch.equal(generate(), control)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_may_change_in_between(name: str) -> None:
    pipe, generate = made(name)
    sizes = dict.fromkeys(("height", "width"), 192 if name in ("sana", "ltx2") else 96)
    wanted = generate(), generate(**sizes)
    assert wanted[0].shape != wanted[1].shape
    apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=12.0)
    first, other = generate(), generate(**sizes)
    assert torch.equal(generate(), first) and torch.equal(generate(**sizes), other)
    assert get_cache_statistics(pipe.transformer)["recomputed"] == 0
    assert not torch.equal(first, wanted[0]) and not torch.equal(other, wanted[1])


@pytest.mark.parametrize("name", SIZES)
def test_the_modulated_input_is_what_attention_is_given(name: str) -> None:
    pipe, generate = made(name)
    adapter = adapter_of(pipe.transformer)
    block = getattr(pipe.transformer, next(iter(adapter.block_lists)))[0]
    attention = next(getattr(block, n) for n in ("attn1", "attn", "attention") if hasattr(block, n))
    given: list[torch.Tensor] = []
    pairs = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given.append(args[0] if args else kwargs["hidden_states"])

    attention.register_forward_pre_hook(note, with_kwargs=True)
    block.register_forward_hook(
        lambda module, args, kwargs, output: pairs.append(
            (adapter.modulated_input(block, args, kwargs), given.pop())
        ),
        with_kwargs=True,
    )
    generate()
    assert len(pairs) >= STEPS
    assert all(torch.equal(found, attended) for found, attended in pairs)


@pytest.mark.parametrize(("texts", "shared"), [((8, 5), 61), ((8, 8), 64), ((3, 8), 59)])
def test_rows_that_are_an_image_in_each_item_are_measured(
    texts: tuple[int, int], shared: int
) -> None:
    """Lumina's texts of a batch differ in length, and its two branches may too."""
    pipe, generate = made("lumina2", batch=2, texts=texts)
    control = generate()
    apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=0.0)
    with counted_tokens() as seen:
        assert torch.equal(generate(), control)
    assert seen == {2 * shared}


def test_each_branch_has_tokens_of_its_own_where_its_text_has_another_length() -> None:
    """Not those of the branch before it: text would be measured in the image's place."""
    block = TINY_PIPELINES["lumina2"]()[0].transformer.layers[0]
    model = TINY_PIPELINES["lumina2"]()[0].transformer
    counts = TokenCounts(lambda args, kwargs: Lumina2Adapter.image_tokens(model, args, kwargs))
    contract = Lumina2Adapter.block_lists["layers"].of(block, counts)
    latents, noise = torch.zeros(1, 4, 16, 16), torch.randn(1, 64, 32)
    for text in (8, 5, 8):
        mask = (torch.arange(8) < text)[None].long()
        counts.open((latents, torch.zeros(1), torch.zeros(1, 8, 16), mask), {})
        given = torch.cat((torch.full((1, text, 32), float("nan")), noise), dim=1)
        streams = contract.read((given, None, None), {})
        assert torch.equal(streams.hidden_states, noise)
        assert torch.equal(contract.pack(streams).nan_to_num(7.0), given.nan_to_num(7.0))


def test_a_text_longer_than_another_with_its_image_leaves_nothing_to_measure() -> None:
    pipe, generate = made("lumina2", batch=2, size=16, texts=(8, 3))  # one image token each
    control = generate()
    apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=12.0)
    assert torch.equal(generate(), control)
    assert get_cache_statistics(pipe.transformer)["block_approx_ratio"] == 0


def test_blocks_that_share_what_they_put_out_are_skipped_together() -> None:
    pipe, _ = made("hunyuan-dit")
    with pytest.raises(ValueError, match=r"granularity=2 cuts HunyuanDiT2DModel.*Leave gran"):
        apply_cache_on_transformer(pipe.transformer, granularity=2)
    request = Request.of(CacheConfig(forecaster="output"), adapters()["hunyuan_dit"])
    request.check(adapters()["hunyuan_dit"], {}, DecisionGroup((0,), 0))
    with pytest.raises(ValueError, match="under PipeFusion.*forecaster='damped_taylor'"):
        request.check(adapters()["hunyuan_dit"], {}, DecisionGroup((0, 1), 0, stages=2))


@pytest.mark.parametrize("options", [{}, {"forecaster": "linear", "granularity": 2}])
def test_the_audio_is_skipped_and_forecast_with_the_video(options: dict[str, Any]) -> None:
    pipe, call = TINY_PIPELINES["ltx2"]()
    pipe.set_progress_bar_config(disable=True)

    def heard(steps: int = STEPS) -> torch.Tensor:
        noise = torch.Generator().manual_seed(1)
        return pipe(**{**call, "num_inference_steps": steps, "generator": noise}).audio

    control, second = heard(), heard(steps=3)
    apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=0.0, **options)
    assert torch.equal(heard(), control)
    remove_cache(pipe.transformer)
    apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=12.0, **options)
    found = heard()
    assert found.isfinite().all() and not torch.equal(found, control)
    branches = {row["branch"] for row in get_cache_trace(pipe.transformer)}
    assert len(branches) == 3  # guidance in a batch, a block that does not attend, and both apart
    assert torch.equal(heard(steps=3), second)  # as the three steps of the second stage are


def test_tokens_of_a_picture_to_begin_with_are_no_noise() -> None:
    latents = torch.zeros(1, 12, 4)
    timestep = torch.tensor([[0.0] * 4 + [700.0] * 8])
    found = LTX2Adapter.image_tokens(None, (latents,), {"timestep": timestep})
    assert found == range(4, 12)
    assert LTX2Adapter.image_tokens(None, (latents,), {"timestep": timestep[:, 4]}) is None


def test_the_two_steps_of_sana_sprint_are_computed() -> None:
    """Its scheduler plans angles, and no sigmas."""
    sizes = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    base, call = TINY_PIPELINES["sana"](**sizes)
    model = base.transformer
    pipe = SanaSprintPipeline(
        scheduler=SCMScheduler(),
        transformer=model,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in call.items() if not k.startswith("negative")}
    call |= {"num_inference_steps": 2, "height": 256, "width": 256}

    def generate() -> torch.Tensor:
        return pipe(**{**call, "generator": torch.Generator().manual_seed(1)}).images

    control = generate()
    apply_cache_on_transformer(model, cache_ratio_threshold=12.0)
    assert torch.equal(generate(), control)
    assert get_cache_statistics(model)["block_approx_ratio"] == 0

"""What all families have in common in plain diffusers, and what is special to some pictures'.

Videos' own: `test_video_families.py`; families with a module of their own are measured there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from support.counted import counted_tokens
from support.families import drawing, made

from diffusers_adapters.ltx2 import LTX2Adapter
from diffusers_adapters.lumina2 import Lumina2Adapter
from diffusers_adapters.registry import adapters
from diffusers_adapters.tiny import TINY_MODELS, TINY_PIPELINES
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

pytestmark = pytest.mark.usefixtures("without_gradients")
STEPS = 6
# Tokens of the picture or video in the tiny pipeline's forward passes; pixels of latents in one.
SIZES = {
    "sana": ({2 * 64}, 1),
    "lumina2": ({64}, 4),
    "hunyuan-dit": ({2 * 64}, 4),
    "ltx2": ({2 * 32, 32}, 1),
    "latte": ({2 * 4 * 64}, 4),
    "hunyuan-video": ({12}, 4),
    "hunyuan-video15": ({48}, 1),
    "cogvideox": ({2 * 48}, 4),
    "consisid": ({2 * 48}, 4),
    **({"ideogram4": ({64}, 1)} if "ideogram4" in TINY_PIPELINES else {}),
}
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "spans": {"forecaster": "linear", "granularity": 2},
    "output": {"forecaster": "output"},
    "split": {"motion_threshold": 0.3},
    "dropped": {"motion_threshold": 0.3, "static_kv": "drop"},
    "merged": {"enable_token_merge": True},
}
FEWER = ("split", "dropped", "merged")  # tokens: where blocks need all, one of these will do
# Another size, and with it another text.
OTHERS: dict[str, Any] = {
    "sana": {"size": 192},
    "lumina2": {"size": 96, "texts": (6, 3)},
    "hunyuan-dit": {"size": 96},
    "ltx2": {"size": 192},
    "latte": {"size": 96},
    "hunyuan-video": {"size": 48, "real_text": 5},
    "hunyuan-video15": {"size": 24},
    "cogvideox": {"size": 48},
    "consisid": {"size": 48},
    "ideogram4": {"size": 160},
}


def adapter(name: str) -> Any:
    return adapters()[TINY_MODELS[name].adapter]


@pytest.mark.parametrize("name", SIZES)
def test_the_picture_alone_is_measured_and_nothing_changes_at_threshold_0(name: str) -> None:
    narrow = adapter(name).narrows
    pipe, generate = made(name, STEPS + 2 if narrow else STEPS)
    control = generate()
    tokens, pixels = SIZES[name]
    # DDIM counts no steps.
    clock = "scheduler" if hasattr(pipe.scheduler, "step_index") else "plan"
    for way, options in WAYS.items():
        in_spans = "granularity" in options and adapter(name).long_skips
        if in_spans or (way in FEWER[1:] and not narrow):
            continue
        narrows = way in FEWER and narrow  # computed steps too
        whole = "output" == (adapter(name).forecaster if way == "default" else way)
        for threshold in (0.0, 12.0):
            apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=threshold, **options)
            with counted_tokens() as seen:
                found = generate()
            statistics = get_cache_statistics(pipe.transformer)
            assert torch.equal(generate(), found), way
            remove_cache(pipe.transformer)
            assert torch.equal(found, control) == (threshold == 0 and not narrows), way
            assert found.isfinite().all(), way
            assert (statistics["block_approx_ratio"] > 0) == (threshold > 0), way
            assert (statistics["spatial_approx_ratio"] > 0) == narrows, way
            assert (statistics["clock"], statistics["recomputed"]) == (clock, 0), way
            assert seen == {of_pass * (pixels if whole else 1) for of_pass in tokens}, way
    assert torch.equal(generate(), control)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_lengths_of_text_may_change_in_between(name: str) -> None:
    pipe, generate = made(name, STEPS)
    _, call = TINY_PIPELINES[name](**OTHERS[name])
    changed = {k: value for k, value in call.items() if k in ("height", "width") or "prompt" in k}
    if name in ("cogvideox", "consisid"):
        changed |= {k: value[:, :5] for k, value in changed.items() if "prompt" in k}
    wanted = generate(), generate(**changed)
    assert wanted[0].shape != wanted[1].shape
    spans = {} if adapter(name).long_skips else {"granularity": 2}
    for options in ({}, {"forecaster": "damped_taylor", **spans}):
        apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=12.0, **options)
        first, other = generate(), generate(**changed)
        assert torch.equal(generate(), first)
        assert torch.equal(generate(**changed), other)
        statistics = get_cache_statistics(pipe.transformer)
        assert (statistics["generations"], statistics["recomputed"]) == (4, 0)
        remove_cache(pipe.transformer)
        assert not torch.equal(first, wanted[0]) and not torch.equal(other, wanted[1])


@pytest.mark.parametrize("name", SIZES)
def test_a_budget_is_exact(name: str) -> None:
    pipe, generate = made(name, STEPS)
    apply_cache_on_transformer(pipe.transformer, computed_steps=4)
    generate()
    rows = get_cache_trace(pipe.transformer)
    branches = {row["branch"] for row in rows}
    computed = {(row["branch"], row["step"]) for row in rows if row["decision"] != "skipped"}
    assert len(computed) == 4 * len(branches) < len(rows)


@pytest.mark.parametrize("name", SIZES)
def test_the_modulated_input_is_what_attention_is_given(name: str) -> None:
    pipe, generate = made(name, STEPS)
    family = adapter_of(pipe.transformer)
    block = getattr(pipe.transformer, next(iter(family.block_lists)))[0]
    attention = next(getattr(block, n) for n in ("attn1", "attn", "attention") if hasattr(block, n))
    given: list[torch.Tensor] = []
    pairs = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given.append(args[0] if args else kwargs["hidden_states"])

    attention.register_forward_pre_hook(note, with_kwargs=True)
    block.register_forward_hook(
        lambda module, args, kwargs, output: pairs.append(
            (family.modulated_input(block, args, kwargs), given.pop())
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
    pipe, generate = made("lumina2", STEPS, batch=2, texts=texts)
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
    pipe, generate = made("lumina2", STEPS, batch=2, size=16, texts=(8, 3))  # one image token each
    control = generate()
    apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=12.0)
    assert torch.equal(generate(), control)
    assert get_cache_statistics(pipe.transformer)["block_approx_ratio"] == 0


def test_blocks_that_share_what_they_put_out_are_skipped_together() -> None:
    pipe, _ = made("hunyuan-dit", STEPS)
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
    call = {k: v for k, v in call.items() if not k.startswith("negative")}
    call |= {"num_inference_steps": 2, "height": 256, "width": 256}
    generate = drawing(pipe, call)
    control = generate()
    apply_cache_on_transformer(model, cache_ratio_threshold=12.0)
    assert torch.equal(generate(), control)
    assert get_cache_statistics(model)["block_approx_ratio"] == 0

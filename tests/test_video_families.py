"""What is special to HunyuanVideo, HunyuanVideo-1.5, CogVideoX and ConsisID in plain diffusers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    HunyuanVideoImageToVideoPipeline,
)
from support.counted import counted_tokens
from support.families import drawing, made
from support.hub import hunyuan_vae

from diffusers_adapters.cogvideox import CogVideoXAdapter
from diffusers_adapters.consisid import ConsisIDAdapter
from diffusers_adapters.hunyuan_video import HunyuanVideoAdapter
from diffusers_adapters.hunyuan_video15 import HunyuanVideo15Adapter
from diffusers_adapters.tiny import TINY_PIPELINES
from diffusers_adapters.tiny.hunyuan_video import tiny_hunyuan_video
from diffusers_adapters.tiny.model import picture
from xfuser_fastcache import (
    apply_cache_on_transformer,
    get_cache_statistics,
    get_cache_trace,
    remove_cache,
)
from xfuser_fastcache.models.token_layout import TokenCounts

pytestmark = pytest.mark.usefixtures("without_gradients")
STEPS = 8


def test_true_guidance_of_hunyuan_video_has_a_branch_a_prompt() -> None:
    pipe, generate = made("hunyuan-video", STEPS)
    text = {
        "negative_prompt_embeds": torch.zeros(1, 8, 16),
        "negative_pooled_prompt_embeds": torch.zeros(1, 8),
        "negative_prompt_attention_mask": torch.ones(1, 8).long(),
    }
    control = generate(true_cfg_scale=2.0, **text)
    for threshold in (0.0, 12.0):
        apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=threshold)
        found = generate(true_cfg_scale=2.0, **text)
        branches = {row["branch"] for row in get_cache_trace(pipe.transformer)}
        statistics = get_cache_statistics(pipe.transformer)
        remove_cache(pipe.transformer)
        assert torch.equal(found, control) == (threshold == 0) and found.isfinite().all()
        assert (len(branches), statistics["recomputed"]) == (2, 0)


def test_cogvideox_runs_with_the_scheduler_of_5b() -> None:
    """It draws noise at each step, and looks back one."""
    pipe, generate = made("cogvideox", STEPS)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    control = generate()
    for options in ({}, {"forecaster": "data"}):
        for threshold in (0.0, 12.0):
            apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=threshold, **options)
            found, again = generate(), generate()
            statistics = get_cache_statistics(pipe.transformer)
            remove_cache(pipe.transformer)
            assert torch.equal(found, control) == (threshold == 0) and found.isfinite().all()
            assert torch.equal(found, again)
            assert (statistics["clock"], statistics["steps"]) == ("plan", 2 * STEPS)
            assert (statistics["block_approx_ratio"] > 0) == (threshold > 0)


@pytest.mark.parametrize("granularity", ["stack", 2, "block"])
def test_a_face_between_blocks_is_in_what_stands_in_for_them_once(granularity: Any) -> None:
    """Of a model that is given the same at each step, a skipped step puts out what all do."""
    pipe, call = TINY_PIPELINES["consisid"]()
    model = pipe.transformer
    for parameter in model.time_embedding.parameters():
        parameter.data.zero_()
    given = {
        "hidden_states": torch.randn(1, 3, 8, 8, 8),
        "encoder_hidden_states": call["prompt_embeds"],
        "id_cond": call["id_cond"],
        "id_vit_hidden": call["id_vit_hidden"],
        "return_dict": False,
    }
    pipe.scheduler.set_timesteps(STEPS)
    (wanted,) = model(timestep=torch.tensor([500]), **given)
    (other,) = model(timestep=torch.tensor([500]), **{**given, "id_cond": -call["id_cond"]})
    assert (wanted - other).norm() > 0.01 * wanted.norm()
    apply_cache_on_transformer(
        model,
        scheduler=pipe.scheduler,
        cache_ratio_threshold=12.0,
        forecaster="reuse",
        granularity=granularity,
    )
    for timestep in pipe.scheduler.timesteps:
        (found,) = model(timestep=timestep[None], **given)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    statistics = get_cache_statistics(model)
    remove_cache(model)
    assert statistics["block_approx_ratio"] > 0.3


def test_padded_text_is_seen_by_nobody_on_few_tokens_either() -> None:
    """The mask has a column a token: those of the video that run, then the text's."""
    found = []
    for padding in (0.0, 1e3):
        pipe, generate = made("hunyuan-video", STEPS, real_text=5)
        _, call = TINY_PIPELINES["hunyuan-video"](real_text=5)
        text = call["prompt_embeds"].clone()
        text[:, 5:] = padding
        apply_cache_on_transformer(
            pipe.transformer, enable_token_merge=True, cache_ratio_threshold=0.0
        )
        found.append(generate(prompt_embeds=text))
        assert get_cache_statistics(pipe.transformer)["spatial_approx_ratio"] > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def image_to_video(condition: str) -> tuple[Any, dict[str, Any]]:
    """HunyuanVideo's with the picture in channels behind the noise, or in the first frame."""
    channels = {"latent_concat": 4 + 4 + 1, "token_replace": 4}[condition]
    pipe, call = tiny_hunyuan_video(in_channels=channels, image_condition_type=condition)
    parts = {**pipe.components, "vae": hunyuan_vae(), "image_processor": None}
    return HunyuanVideoImageToVideoPipeline(**parts), {**call, "image": picture(call["height"])}


@pytest.mark.parametrize(("condition", "tokens"), [("latent_concat", 12), ("token_replace", 8)])
def test_of_image_to_video_noise_alone_is_measured(condition: str, tokens: int) -> None:
    pipe, call = image_to_video(condition)
    generate = drawing(pipe, {**call, "num_inference_steps": STEPS})
    control = generate()
    ways = {"default": {}, "spans": {"granularity": 2}, "split": {"motion_threshold": 0.3}}
    for way, options in {**ways, "first block": {"use_cache": "Fb"}}.items():
        for threshold in (0.0, 12.0):
            apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=threshold, **options)
            with counted_tokens() as seen:
                found = generate()
            hits = get_cache_statistics(pipe.transformer)["block_approx_ratio"]
            remove_cache(pipe.transformer)
            assert torch.equal(found, control) == (threshold == 0 and way != "split"), way
            assert (hits > 0) == (threshold > 0) and found.isfinite().all(), way
            wanted = {"default": {4 * tokens}, "first block": set()}.get(way, {tokens})
            assert seen == wanted, way
    assert torch.equal(generate(), control)


def test_of_65_channels_the_first_32_are_measured() -> None:
    config = SimpleNamespace(in_channels=65, out_channels=32, patch_size=1, patch_size_t=1)
    model = SimpleNamespace(config=config)
    counts = TokenCounts(
        lambda args, kwargs: HunyuanVideo15Adapter.image_tokens(model, args, kwargs)
    )
    forward = HunyuanVideo15Adapter.forward_contract(model, counts)
    noise = torch.randn(1, 32, 3, 4, 4)
    for given in (1.0, float("nan")):
        video = torch.cat((noise, torch.full((1, 33, 3, 4, 4), given)), dim=1)
        counts.open((), {"hidden_states": video})
        assert counts.image == range(48)
        read = forward.read((), {"hidden_states": video}).hidden_states
        assert torch.equal(read, noise.movedim(1, -1).flatten(1, 3))


@pytest.mark.parametrize(
    ("adapter", "config", "first"),
    [
        (HunyuanVideoAdapter, {"image_condition_type": None}, 733.226126),
        (HunyuanVideoAdapter, {"image_condition_type": "token_replace"}, None),
        (CogVideoXAdapter, {"num_attention_heads": 30}, -31.0658903),
        (CogVideoXAdapter, {}, -1538.80483),
        (CogVideoXAdapter, {"in_channels": 32}, -1538.80483),
        (CogVideoXAdapter, {"patch_size_t": 2}, 250.210439),
        (CogVideoXAdapter, {"patch_size_t": 2, "in_channels": 32}, 122.842302),
        (CogVideoXAdapter, {"num_attention_heads": 2}, None),
        (ConsisIDAdapter, {"in_channels": 32}, -1538.80483),
    ],
)
def test_published_polynomials_are_for_their_models(
    adapter: Any, config: dict[str, Any], first: float | None
) -> None:
    sizes = {
        "num_attention_heads": 48,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size_t": None,
    }
    model = SimpleNamespace(config=SimpleNamespace(**{**sizes, **config}))
    found = adapter.tea_polynomial_of(model)
    assert found is None if first is None else found[0] == first and len(found) == 5


def test_tea_measures_cogvideox_s_timestep_embedding() -> None:
    pipe, generate = made("cogvideox", STEPS)
    apply_cache_on_transformer(pipe.transformer, use_cache="Tea", cache_ratio_threshold=0.3)
    generate()
    judged = {row["step"]: row["statistic"] for row in get_cache_trace(pipe.transformer)}
    remove_cache(pipe.transformer)
    seen: list[torch.Tensor] = []
    handle = pipe.transformer.time_embedding.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    generate()
    handle.remove()
    change = (seen[1] - seen[0]).abs().sum() / seen[0].abs().sum()
    assert judged[1] == pytest.approx(float(change), rel=1e-5)

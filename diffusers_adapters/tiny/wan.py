"""Wan 2.1 and 2.2, and VACE."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs, picture


def tiny_wan(
    seed: int = 0,
    batch: int = 1,
    size: int = 32,
    pipeline_class: type[Any] = WanPipeline,
    model_class: type[Any] = WanTransformer3DModel,
    experts: int = 1,
    **sizes: Any,
) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 T2V: 9 frames at 32 x 32 pixels with guidance: 3 x 2 x 2 tokens, two heads.

    Args:
        seed: of the weights, and of the embeddings.
        batch: videos.
        size: pixels of a side; 48 makes 27 tokens.
        pipeline_class, model_class: of diffusers.
        experts: 2 for Wan 2.2 A14B, which has one for much noise and one for little.
        **sizes: of the model; `expand_timesteps` is the pipeline's.
    """
    torch.manual_seed(seed)
    of_pipeline: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if "expand_timesteps" in sizes:
        of_pipeline["expand_timesteps"] = sizes.pop("expand_timesteps")
    if pipeline_class is not WanPipeline:
        of_pipeline["vae"] = tiny_wan_vae()
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "text_dim": 32,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 32,
        **sizes,
    }
    of_pipeline["transformer"] = model_class(**config).eval()
    if experts == 2:
        of_pipeline.update(transformer_2=model_class(**config).eval(), boundary_ratio=0.875)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    call = call_kwargs(batch, size)
    call["num_frames"] = 9
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        call[name] = torch.randn(batch, TEXT_TOKENS, 32)
    return pipeline_class(scheduler=scheduler, **of_pipeline), call


def tiny_wan_vae() -> AutoencoderKLWan:
    """Return Wan's: a latent of 16 channels for 8 x 8 pixels of 4 frames."""
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


def tiny_wan_i2v(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 I2V: `tiny_wan` with the channels of a mask and a picture, which also is attended to.

    Its attention takes all text but the last 512 tokens for the picture's.
    """
    pipeline, call = tiny_wan(
        batch=batch,
        pipeline_class=WanImageToVideoPipeline,
        in_channels=16 + 4 + 16,
        image_dim=8,
        added_kv_proj_dim=16,
        **sizes,
    )
    embedded = torch.randn(1, 9, 8)
    pipeline.encode_image = lambda image, device=None: embedded
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        call[name] = torch.nn.functional.pad(call[name], (0, 0, 0, 512 - TEXT_TOKENS))
    return pipeline, {**call, "image": picture(call["height"])}


def tiny_wan22_i2v(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """Wan 2.2 I2V A14B: two experts with the channels of a mask and a picture; no image's text."""
    pipeline, call = tiny_wan(
        batch=batch,
        pipeline_class=WanImageToVideoPipeline,
        experts=2,
        in_channels=16 + 4 + 16,
        **sizes,
    )
    return pipeline, {**call, "image": picture(call["height"])}


def tiny_wan_ti2v(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """Wan 2.2 TI2V: `tiny_wan` with a timestep a token; the first frame's four are given."""
    pipeline, call = tiny_wan(
        batch=batch, pipeline_class=WanImageToVideoPipeline, expand_timesteps=True, **sizes
    )
    return pipeline, {**call, "image": picture(call["height"])}


def tiny_wan_vace(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 VACE: `tiny_wan` with hints for two of its blocks; one video a call."""
    assert batch == 1
    pipeline, call = tiny_wan(
        pipeline_class=WanVACEPipeline,
        model_class=WanVACETransformer3DModel,
        vace_layers=[0, 2],
        **sizes,
    )
    return pipeline, {**call, "generator": call["generator"][0]}


_CFG = ("--use_cfg_parallel",)
MODELS = {
    "wan": TinyModel(tiny_wan, "wan", of_runner=True),
    "wan-i2v": TinyModel(tiny_wan_i2v, "wan", of_runner=True, beyond=_CFG),
    "wan-ti2v": TinyModel(tiny_wan_ti2v, "wan", of_runner=True, beyond=_CFG),
    "wan22": TinyModel(partial(tiny_wan, experts=2), "wan", of_runner=True),
    "wan22-i2v": TinyModel(tiny_wan22_i2v, "wan", of_runner=True, beyond=_CFG),
    "wan-vace": TinyModel(tiny_wan_vace, "wan_vace", of_runner=True, alone=True),
}

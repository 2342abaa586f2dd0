"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs


def tiny_sd3(
    seed: int = 0, num_layers: int = 4, batch: int = 1, **transformer_config: Any
) -> tuple[StableDiffusion3Pipeline, dict[str, Any]]:
    """SD3 at 64 x 64 pixels with guidance: 8 x 8 image tokens and 8 text tokens, four heads."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        **transformer_config,
    ).eval()
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = dict.fromkeys((*names, "text_encoder_3", "tokenizer_3"))
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts
    )
    call = call_kwargs(batch, 64)
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, TEXT_TOKENS, 32)
        call[f"{prefix}pooled_prompt_embeds"] = torch.randn(batch, 64)
    return pipeline, call


def tiny_sd35(
    seed: int = 0, num_layers: int = 4, batch: int = 1
) -> tuple[StableDiffusion3Pipeline, dict[str, Any]]:
    """SD3.5: `tiny_sd3` with normed queries and keys, and blocks that attend to the image twice.

    The last block has one attention; of two pipeline stages, both hold blocks with two.
    """
    dual = tuple(range(num_layers - 1))
    return tiny_sd3(seed, num_layers, batch, dual_attention_layers=dual, qk_norm="rms_norm")


MODELS = {
    "sd3": TinyModel(tiny_sd3, "sd3"),
    "sd3.5": TinyModel(tiny_sd35, "sd3"),
}

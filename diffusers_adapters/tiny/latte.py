"""Latte."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs


def tiny_latte(
    seed: int = 0, batch: int = 1, size: int = 128, num_layers: int = 4
) -> tuple[LattePipeline, dict[str, Any]]:
    """Latte with guidance: 4 frames of 8 x 8 tokens at 128 x 128 pixels, two heads.

    Blocks over a frame's tokens take turns with blocks over a place's frames.
    """
    torch.manual_seed(seed)
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=num_layers,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=16,
        video_length=4,
    ).eval()
    pipeline = LattePipeline(
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
        transformer=transformer,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    call = {**call_kwargs(batch, size), "video_length": 4}
    # It needs both, or a text encoder's prompt.
    call.update(prompt=None, negative_prompt=None, clean_caption=False, mask_feature=False)
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, TEXT_TOKENS, 16)
    return pipeline, call


MODELS = {"latte": TinyModel(tiny_latte, "latte")}

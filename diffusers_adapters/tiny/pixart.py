"""PixArt alpha and Sigma."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs


def tiny_pixart(
    seed: int = 0,
    num_layers: int = 4,
    batch: int = 1,
    pipeline_class: type[Any] = PixArtAlphaPipeline,
) -> tuple[Any, dict[str, Any]]:
    """PixArt at 64 x 64 pixels with guidance: 4 x 4 image tokens, four heads."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=num_layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).eval()
    pipeline = pipeline_class(
        scheduler=DPMSolverMultistepScheduler(),
        transformer=transformer,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    call = call_kwargs(batch, 64)
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, TEXT_TOKENS, 32)
        call[f"{prefix}prompt_attention_mask"] = torch.ones(batch, TEXT_TOKENS)
    # Both need a text encoder's prompt or a VAE's sample size.
    call.update(prompt=None, negative_prompt=None, use_resolution_binning=False)
    return pipeline, call


MODELS = {
    "pixart": TinyModel(tiny_pixart, "pixart"),
    "pixart-sigma": TinyModel(partial(tiny_pixart, pipeline_class=PixArtSigmaPipeline), "pixart"),
}

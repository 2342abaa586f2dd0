"""SANA."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs


def tiny_sana(
    seed: int = 0, batch: int = 1, size: int = 256, **sizes: Any
) -> tuple[SanaPipeline, dict[str, Any]]:
    """SANA with guidance: a token a latent pixel, 8 x 8 of them at 256 x 256 pixels, four heads."""
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        **sizes,
    ).eval()
    pipeline = SanaPipeline(
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    call = call_kwargs(batch, size)
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, TEXT_TOKENS, 16)
        call[f"{prefix}prompt_attention_mask"] = torch.ones(batch, TEXT_TOKENS)
    # Both need a text encoder's prompt or a VAE's sample size.
    call.update(prompt=None, negative_prompt=None, use_resolution_binning=False)
    return pipeline, call


MODELS = {"sana": TinyModel(tiny_sana, "sana")}

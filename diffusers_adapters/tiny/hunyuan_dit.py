"""HunyuanDiT."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs


def tiny_hunyuan_dit(
    seed: int = 0, batch: int = 1, size: int = 128, num_layers: int = 6
) -> tuple[HunyuanDiTPipeline, dict[str, Any]]:
    """HunyuanDiT with guidance: 8 x 8 image tokens at 128 x 128 pixels, texts of two encoders.

    Of six blocks the last two take what the first two have put out.
    """
    torch.manual_seed(seed)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        num_layers=num_layers,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=TEXT_TOKENS,
        text_len_t5=TEXT_TOKENS,
        use_style_cond_and_image_meta_size=False,
    ).eval()
    pipeline = HunyuanDiTPipeline(
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.02, prediction_type="v_prediction"
        ),
        transformer=transformer,
        requires_safety_checker=False,
        **dict.fromkeys(
            (
                *("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
                *("safety_checker", "feature_extractor"),
            )
        ),
    )
    call = {**call_kwargs(batch, size), "use_resolution_binning": False}
    for prefix in ("", "negative_"):
        for suffix in ("", "_2"):
            call[f"{prefix}prompt_embeds{suffix}"] = torch.randn(batch, TEXT_TOKENS, 16)
            call[f"{prefix}prompt_attention_mask{suffix}"] = torch.ones(batch, TEXT_TOKENS)
    return pipeline, call


MODELS = {"hunyuan-dit": TinyModel(tiny_hunyuan_dit, "hunyuan_dit")}

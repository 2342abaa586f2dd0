"""Lumina-Image 2.0."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs


def tiny_lumina2(
    seed: int = 0, batch: int = 1, size: int = 128, texts: tuple[int, ...] = (8, 5)
) -> tuple[Lumina2Pipeline, dict[str, Any]]:
    """Lumina-Image 2.0 with guidance: 8 x 8 image tokens at 128 x 128 pixels, behind the text.

    Args:
        seed: of the weights, and of the embeddings.
        batch: pictures.
        size: pixels of a side.
        texts: tokens of each prompt, by turns, and then of each negative one; at most 8.
    """
    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    ).eval()
    pipeline = Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=transformer,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    call = call_kwargs(batch, size)
    for turn, prefix in enumerate(("", "negative_")):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, TEXT_TOKENS, 16)
        lengths = [texts[(turn * batch + item) % len(texts)] for item in range(batch)]
        given = torch.arange(TEXT_TOKENS) < torch.tensor(lengths)[:, None]
        call[f"{prefix}prompt_attention_mask"] = given.long()
    return pipeline, call


MODELS = {"lumina2": TinyModel(tiny_lumina2, "lumina2")}

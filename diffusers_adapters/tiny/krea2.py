"""Krea-2 Raw and Turbo."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs


def tiny_krea2(
    seed: int = 0,
    batch: int = 1,
    size: int = 64,
    text: int = TEXT_TOKENS,
    is_distilled: bool = False,
    **sizes: Any,
) -> tuple[Any, dict[str, Any]]:
    """Krea-2 at 64 x 64 pixels: 4 x 4 image tokens behind 8 of text, some masked.

    Args:
        seed: of the weights, and of the embeddings.
        batch: pictures.
        size: pixels of a side; 48 makes 9 tokens.
        text: tokens of each prompt, padding included: the pipeline pads both alike.
        is_distilled: as Turbo is, which draws without guidance.
        **sizes: of the model.
    """
    torch.manual_seed(seed)
    config = {
        "in_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 16,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 24,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
        **sizes,
    }
    transformer = diffusers.Krea2Transformer2DModel(**config).eval()
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.endswith("scale_shift_table"):
                weight.normal_(std=0.3)  # made as zeros
    pipeline = diffusers.Krea2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=transformer,
        text_encoder_select_layers=(0, 1, 2),
        is_distilled=is_distilled,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    call = {**call_kwargs(batch, size), "guidance_scale": 0.0 if is_distilled else 3.5}
    for prefix, prompt in (("", text // 2), ("negative_", 1)):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, text, 3, 16)
        mask = torch.ones(batch, text, dtype=torch.bool)
        mask[:, prompt : text - 2] = False  # padding stands between the prompt and a suffix
        call[f"{prefix}prompt_embeds_mask"] = mask
    return pipeline, call


# Diffusers 0.37 has no such class.
MODELS = (
    {
        "krea2": TinyModel(tiny_krea2, "krea2", of_runner=True),
        "krea2-turbo": TinyModel(partial(tiny_krea2, is_distilled=True), "krea2", of_runner=True),
    }
    if hasattr(diffusers, "Krea2Pipeline")
    else {}
)

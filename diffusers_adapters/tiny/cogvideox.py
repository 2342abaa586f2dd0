"""CogVideoX."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs


def tiny_cogvideox(
    seed: int = 0, batch: int = 1, size: int = 64, **sizes: Any
) -> tuple[CogVideoXPipeline, dict[str, Any]]:
    """CogVideoX: 9 frames at 64 x 64 pixels, guidance in the batch: 3 x 4 x 4 tokens, two heads.

    Args:
        seed: of the weights, and of the embeddings.
        batch: videos.
        size: pixels of a side; 48 makes 27 tokens.
        **sizes: of the model.
    """
    torch.manual_seed(seed)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "num_layers": 4,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": TEXT_TOKENS,
        "use_rotary_positional_embeddings": True,
        **sizes,
    }
    pipeline = CogVideoXPipeline(
        transformer=CogVideoXTransformer3DModel(**config).eval(),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
            set_alpha_to_one=True,
        ),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    call = {**call_kwargs(batch, size), "num_frames": 9}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        call[name] = torch.randn(batch, TEXT_TOKENS, 32)
    return pipeline, call


MODELS = {"cogvideox": TinyModel(tiny_cogvideox, "cogvideox")}

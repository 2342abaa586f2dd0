"""HunyuanVideo 1.0 and 1.5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs

_PARTS = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def tiny_hunyuan_video(
    seed: int = 0, batch: int = 1, size: int = 32, real_text: int = TEXT_TOKENS, **sizes: Any
) -> tuple[Any, dict[str, Any]]:
    """HunyuanVideo 1.0: 9 frames at 32 x 32 pixels: 3 x 2 x 2 tokens, 8 of text, two heads.

    Args:
        seed: of the weights, and of the embeddings.
        batch: videos.
        size: pixels of a side; 48 makes 27 tokens.
        real_text: how many tokens of text are no padding.
        **sizes: of the model.
    """
    torch.manual_seed(seed)
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 2, 4),
        **sizes,
    }
    transformer = HunyuanVideoTransformer3DModel(**config).eval()
    pipeline = HunyuanVideoPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **_PARTS
    )
    mask = (torch.arange(TEXT_TOKENS) < real_text).long().expand(batch, -1)
    return pipeline, {
        **call_kwargs(batch, size),
        "num_frames": 9,
        "prompt_embeds": torch.randn(batch, TEXT_TOKENS, 16),
        "pooled_prompt_embeds": torch.randn(batch, 8),
        "prompt_attention_mask": mask,
    }


def tiny_hunyuan_video15(
    seed: int = 0, batch: int = 1, size: int = 32, **sizes: Any
) -> tuple[Any, dict[str, Any]]:
    """HunyuanVideo-1.5: 9 frames at 32 x 32 pixels, two calls a step: 3 x 4 x 4 tokens, two heads.

    Each prompt has text of two encoders, of which the padding is left out: 8 and 4 tokens in the
    one, 6 and 3 in the negative one.

    Args:
        seed: of the weights, and of the embeddings.
        batch: videos.
        size: pixels of a side; 24 makes 27 tokens.
        **sizes: of the model.
    """
    torch.manual_seed(seed)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        target_size=size,
        task_type="t2v",
        **sizes,
    ).eval()
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    ).eval()
    pipeline = HunyuanVideo15Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        **{**_PARTS, "vae": vae},
    )
    pipeline.vision_num_semantic_tokens = 2  # of a picture, masked out
    call = {**call_kwargs(batch, size), "num_frames": 9}
    for prefix, padded in (("", 0), ("negative_", 1)):
        for suffix, tokens, width in (("", TEXT_TOKENS, 16), ("_2", 4, 12)):
            call[f"{prefix}prompt_embeds{suffix}"] = torch.randn(batch, tokens, width)
            real = tokens * (4 - padded) // 4
            mask = (torch.arange(tokens) < real).long()
            call[f"{prefix}prompt_embeds_mask{suffix}"] = mask.expand(batch, -1)
    return pipeline, call


MODELS = {
    "hunyuan-video": TinyModel(tiny_hunyuan_video, "hunyuan_video", of_runner=True),
    "hunyuan-video15": TinyModel(tiny_hunyuan_video15, "hunyuan_video15", of_runner=True),
}

"""Qwen-Image, and Qwen-Image-Edit with both of its ways to take a picture in."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs, picture


def tiny_qwen(
    seed: int = 0,
    batch: int = 1,
    size: int = 64,
    text: tuple[int, int] = (TEXT_TOKENS, TEXT_TOKENS - 2),
    pipeline_class: type[Any] = QwenImagePipeline,
    **sizes: Any,
) -> tuple[Any, dict[str, Any]]:
    """Qwen-Image at 64 x 64 pixels with guidance: 4 x 4 image tokens, two heads.

    Args:
        seed: of the weights, and of the embeddings.
        batch: pictures.
        size: pixels of a side; 48 makes 9 tokens.
        text: tokens of the prompt, and of the negative one.
        pipeline_class: of diffusers.
        **sizes: of the model.
    """
    torch.manual_seed(seed)
    config = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
        **sizes,
    }
    names: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    names += () if pipeline_class is QwenImagePipeline else ("processor",)
    pipeline = pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=QwenImageTransformer2DModel(**config).eval(),
        **dict.fromkeys(names),
    )
    call = call_kwargs(batch, size)
    for prefix, tokens in zip(("", "negative_"), text, strict=True):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, tokens, 16)
        call[f"{prefix}prompt_embeds_mask"] = torch.ones(batch, tokens).long()
    return pipeline, call


def tiny_qwen_edit(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """Qwen-Image-Edit: `tiny_qwen` and behind it the 4 x 2 tokens of a picture to edit.

    The pipeline makes a megapixel of every picture; here 64 x 32 pixels.
    """
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (64, 32, None)
    pipeline, call = tiny_qwen(batch=batch, pipeline_class=QwenImageEditPipeline, **sizes)
    encoded = torch.randn(1, 4, 1, 4, 8)
    pipeline._encode_vae_image = lambda image, generator: encoded
    return pipeline, {**call, "image": picture(64)}


_CFG = ("--use_cfg_parallel",)
MODELS = {
    "qwen": TinyModel(tiny_qwen, "qwen_image", of_runner=True),
    "qwen-edit": TinyModel(tiny_qwen_edit, "qwen_image", of_runner=True, beyond=_CFG),
    # As the version of November 2025 does, it tells tokens of the picture their own timestep.
    "qwen-edit-2511": TinyModel(
        partial(tiny_qwen_edit, zero_cond_t=True),
        "qwen_image",
        of_runner=True,
        beyond=_CFG,
    ),
}

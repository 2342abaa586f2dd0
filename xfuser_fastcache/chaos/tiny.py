"""Tiny pipelines with random weights in xfuser's classes, one of each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from xfuser_fastcache.xdit.loaded import put_in_layout

STEPS = 8
_TEXT = 8


def flux() -> tuple[Any, dict[str, Any]]:
    """FLUX at 128 x 128 pixels: 8 x 8 image tokens and 8 text tokens."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    missing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer.eval(),
        **missing,
    )
    text = {"prompt_embeds": torch.randn(1, _TEXT, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    return pipeline, {**text, "height": 128, "width": 128, "max_sequence_length": _TEXT}


def sd3() -> tuple[Any, dict[str, Any]]:
    """SD3 at 64 x 64 pixels with guidance: 8 x 8 image tokens and 8 text tokens."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    missing = dict.fromkeys((*names, "text_encoder_3", "tokenizer_3"))
    pipeline = diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer.eval(),
        **missing,
    )
    call: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": _TEXT}
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(1, _TEXT, 32)
        call[f"{prefix}pooled_prompt_embeds"] = torch.randn(1, 64)
    return pipeline, call


def pixart() -> tuple[Any, dict[str, Any]]:
    """PixArt at 64 x 64 pixels with guidance: 4 x 4 image tokens."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
    )
    missing = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipeline = diffusers.PixArtAlphaPipeline(
        scheduler=diffusers.DPMSolverMultistepScheduler(), transformer=transformer.eval(), **missing
    )
    call: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False}
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt"] = None
        call[f"{prefix}prompt_embeds"] = torch.randn(1, _TEXT, 32)
        call[f"{prefix}prompt_attention_mask"] = torch.ones(1, _TEXT)
    return pipeline, call


FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "flux": flux,
    "sd3": sd3,
    "pixart": pixart,
}


def build(family: str, **flags: Any) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline in xfuser's class, and the arguments of one call; equal on all ranks.

    Args:
        family: a name of `FAMILIES`.
        **flags: fields of `xFuserArgs`, degrees of parallelism among them.
    """
    torch.manual_seed(0)
    pipeline, call = FAMILIES[family]()
    pipeline.set_progress_bar_config(disable=True)
    pipe = put_in_layout(
        pipeline,
        height=call["height"],
        width=call["width"],
        num_inference_steps=STEPS,
        max_sequence_length=_TEXT,
        output_type="latent",
        warmup_steps=1,
        **flags,
    )
    return pipe, {**call, "num_inference_steps": STEPS}

"""Tiny pipelines with random weights, in diffusers' own classes, for tests without downloads.

Each function returns a diffusers pipeline without text encoders and VAE, and the keyword arguments
of one call: embeddings, size, steps and ``output_type="latent"``. The same seed gives the same
weights and embeddings on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

TEXT_TOKENS = 8


def tiny_flux(
    seed: int = 0, num_layers: int = 2, num_single_layers: int = 4, batch: int = 1
) -> tuple[FluxPipeline, dict[str, Any]]:
    """FLUX at 128 x 128 pixels: 8 x 8 image tokens and 8 text tokens, two heads."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts
    )
    call = _call_kwargs(batch, 128)
    # xfuser splits the single blocks' tokens at max_sequence_length under PipeFusion: it has to be
    # the number of text tokens that are really there.
    call.update(
        prompt_embeds=torch.randn(batch, TEXT_TOKENS, 32),
        pooled_prompt_embeds=torch.randn(batch, 32),
        max_sequence_length=TEXT_TOKENS,
    )
    return pipeline, call


def tiny_sd3(
    seed: int = 0, num_layers: int = 4, batch: int = 1, **transformer_config: Any
) -> tuple[StableDiffusion3Pipeline, dict[str, Any]]:
    """SD3 at 64 x 64 pixels with guidance: 8 x 8 image tokens and 8 text tokens, four heads."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        **transformer_config,
    ).eval()
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = dict.fromkeys((*names, "text_encoder_3", "tokenizer_3"))
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts
    )
    call = _call_kwargs(batch, 64)
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, TEXT_TOKENS, 32)
        call[f"{prefix}pooled_prompt_embeds"] = torch.randn(batch, 64)
    return pipeline, call


def tiny_sd35(
    seed: int = 0, num_layers: int = 4, batch: int = 1
) -> tuple[StableDiffusion3Pipeline, dict[str, Any]]:
    """SD3.5: `tiny_sd3` with normed queries and keys, and blocks that attend to the image twice.

    The last block has one attention; of two pipeline stages, both hold blocks with two.
    """
    dual = tuple(range(num_layers - 1))
    return tiny_sd3(seed, num_layers, batch, dual_attention_layers=dual, qk_norm="rms_norm")


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
    call = _call_kwargs(batch, 64)
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, TEXT_TOKENS, 32)
        call[f"{prefix}prompt_attention_mask"] = torch.ones(batch, TEXT_TOKENS)
    # Both need a text encoder's prompt or a VAE's sample size.
    call.update(prompt=None, negative_prompt=None, use_resolution_binning=False)
    return pipeline, call


TINY_PIPELINES: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
    "flux": tiny_flux,
    "sd3": tiny_sd3,
    "sd3.5": tiny_sd35,
    "pixart": tiny_pixart,
    "pixart-sigma": partial(tiny_pixart, pipeline_class=PixArtSigmaPipeline),
}
# The registered adapter that each of them is for.
ADAPTER_OF = {
    "flux": "flux",
    "sd3": "sd3",
    "sd3.5": "sd3",
    "pixart": "pixart",
    "pixart-sigma": "pixart",
}


def _call_kwargs(batch: int, size: int) -> dict[str, Any]:
    generator = [torch.Generator("cpu").manual_seed(1000 + item) for item in range(batch)]
    return {
        "height": size,
        "width": size,
        "num_inference_steps": 3,
        "generator": generator,
        "output_type": "latent",
    }

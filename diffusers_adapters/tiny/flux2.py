"""FLUX.2 dev and klein, tiny, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)

from diffusers_adapters.tiny.model import TEXT_TOKENS, Limit, TinyModel, call_kwargs, picture


def tiny_flux2(
    seed: int = 0,
    batch: int = 1,
    size: int = 128,
    pipeline_class: type[Any] = Flux2Pipeline,
    num_layers: int = 1,
    num_single_layers: int = 3,
    text_dim: int = 32,
    **of_pipeline: Any,
) -> tuple[Any, dict[str, Any]]:
    """FLUX.2 dev: 8 x 8 image tokens at 128 x 128 pixels and 8 text tokens, two heads.

    Args:
        seed: of the weights, and of the embeddings.
        batch: pictures.
        size: pixels of a side; 112 makes 49 tokens.
        pipeline_class: of diffusers.
        num_layers, num_single_layers: of the transformer.
        text_dim: width of the text's embeddings.
        **of_pipeline: more of the pipeline's arguments.
    """
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_dim,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=pipeline_class is Flux2Pipeline,
    ).eval()
    pipeline = pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=transformer,
        vae=tiny_flux2_vae(),
        **{"text_encoder": None, "tokenizer": None, **of_pipeline},
    )
    call = call_kwargs(batch, size)
    call.update(
        prompt_embeds=torch.randn(batch, TEXT_TOKENS, text_dim), max_sequence_length=TEXT_TOKENS
    )
    return pipeline, call


def tiny_flux2_edit(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """FLUX.2 dev with a picture to edit, of 4 x 4 tokens."""
    pipeline, call = tiny_flux2(batch=batch, **sizes)
    return pipeline, {**call, "image": picture(64)}


def tiny_klein(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """FLUX.2 klein, not distilled: two calls a step, or one at a `guidance_scale` of 1."""
    pipeline, call = tiny_flux2(
        batch=batch, pipeline_class=Flux2KleinPipeline, is_distilled=False, **sizes
    )
    return pipeline, {**call, "negative_prompt_embeds": torch.randn_like(call["prompt_embeds"])}


def tiny_flux2_vae() -> AutoencoderKLFlux2:
    """Return FLUX.2's: a latent of 4 channels for 8 x 8 pixels, of which a token has four."""
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
    ).eval()


_DROPPED = Limit(
    "--pipefusion_parallel_degree=2",
    "xDiT's pipeline class for PipeFusion drops pictures to edit, and the second call of guidance",
    error=None,
)
MODELS = {
    "flux2": TinyModel(tiny_flux2, "flux2", of_runner=True),
    "flux2-edit": TinyModel(tiny_flux2_edit, "flux2", of_runner=True, limits=(_DROPPED,)),
    "klein": TinyModel(tiny_klein, "flux2", of_runner=True, limits=(_DROPPED,)),
}

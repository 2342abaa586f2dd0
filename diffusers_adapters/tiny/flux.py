"""FLUX.1, Control, which follows a picture, and Kontext and Fill, which edit one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from diffusers_adapters.tiny.model import TEXT_TOKENS, Limit, TinyModel, call_kwargs


def tiny_flux(
    seed: int = 0,
    num_layers: int = 2,
    num_single_layers: int = 4,
    batch: int = 1,
    pipeline_class: type[Any] = FluxPipeline,
    channels: int = 16,
    condition_channels: int = 0,
    size: int = 128,
    **more_parts: Any,
) -> tuple[Any, dict[str, Any]]:
    """FLUX: 8 x 8 image tokens at 128 x 128 pixels and 8 text tokens, two heads."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels + condition_channels,
        out_channels=channels,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = {**dict.fromkeys(names), **more_parts}
    pipeline = pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts
    )
    call = call_kwargs(batch, size)
    # xfuser splits the single blocks' tokens at max_sequence_length under PipeFusion: it has to be
    # the number of text tokens that are really there.
    call.update(
        prompt_embeds=torch.randn(batch, TEXT_TOKENS, 32),
        pooled_prompt_embeds=torch.randn(batch, 32),
        max_sequence_length=TEXT_TOKENS,
    )
    return pipeline, call


def _vae() -> AutoencoderKL:
    """Return one that makes latents of 4 channels, which are 16 in a token."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=1,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def tiny_kontext(batch: int = 1, **sizes: Any) -> tuple[FluxKontextPipeline, dict[str, Any]]:
    """FLUX.1-Kontext: `tiny_flux`, and the 8 x 4 tokens of a picture to edit, given as latents."""
    # Without a VAE the pipeline takes its latents to have 16 channels, 64 in a token.
    pipeline, call = tiny_flux(
        batch=batch, pipeline_class=FluxKontextPipeline, channels=64, **sizes
    )
    area = call["height"] * call["width"]
    call.update(image=torch.randn(batch, 16, 16, 8), max_area=area, _auto_resize=False)
    return pipeline, call


def tiny_fill(batch: int = 1, **sizes: Any) -> tuple[FluxFillPipeline, dict[str, Any]]:
    """FLUX.1-Fill: `tiny_flux` with the channels of a masked picture and a mask behind the noise.

    Its VAE makes latents of 4 channels, which are 16 in a token; the mask has 16 x 16 pixels there.
    """
    pipeline, call = tiny_flux(
        batch=batch,
        pipeline_class=FluxFillPipeline,
        condition_channels=16 + 256,
        vae=_vae(),
        **sizes,
    )
    mask = torch.zeros(batch, 1, 128, 128)
    mask[..., 64:] = 1.0
    call.update(image=torch.rand(batch, 3, 128, 128), mask_image=mask)
    return pipeline, call


def tiny_control(batch: int = 1, **sizes: Any) -> tuple[FluxControlPipeline, dict[str, Any]]:
    """FLUX.1-Control: `tiny_flux` with the channels of a control picture behind the noise."""
    pipeline, call = tiny_flux(
        batch=batch, pipeline_class=FluxControlPipeline, condition_channels=16, vae=_vae(), **sizes
    )
    call["control_image"] = torch.rand(batch, 3, call["height"], call["width"])
    return pipeline, call


_NO_CLASS = "xDiT has no pipeline class for it, so that its runner's transformer cuts all by itself"
_STAGES, _CFG = "--pipefusion_parallel_degree=2", "--use_cfg_parallel"
_OF_KONTEXT = tuple(
    Limit(flag, "its runner refuses it", f"does not support {flag.strip('-').split('=')[0]}")
    for flag in (_STAGES, _CFG)
)
_OF_FILL = (
    Limit(_STAGES, _NO_CLASS, "is not supported by xFuser"),
    Limit(_CFG, _NO_CLASS, "Cannot split dim 0 of hidden_states (1) into 2 parts"),
)
MODELS = {
    "flux": TinyModel(tiny_flux, "flux"),
    "flux-kontext": TinyModel(tiny_kontext, "flux", of_runner=True, limits=_OF_KONTEXT),
    "flux-control": TinyModel(tiny_control, "flux"),
    "flux-fill": TinyModel(tiny_fill, "flux", of_runner=True, limits=_OF_FILL),
}

"""Tiny pipelines with random weights, in diffusers' own classes, for tests without downloads.

Each function returns a diffusers pipeline without text encoders and VAE, and the keyword arguments
of one call: embeddings, size, steps and ``output_type="latent"``. The same seed gives the same
weights and embeddings on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image

TEXT_TOKENS = 8


def tiny_flux(
    seed: int = 0,
    num_layers: int = 2,
    num_single_layers: int = 4,
    batch: int = 1,
    pipeline_class: type[Any] = FluxPipeline,
    channels: int = 16,
    condition_channels: int = 0,
    **more_parts: Any,
) -> tuple[Any, dict[str, Any]]:
    """FLUX at 128 x 128 pixels: 8 x 8 image tokens and 8 text tokens, two heads."""
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
    call = _call_kwargs(batch, 128)
    # xfuser splits the single blocks' tokens at max_sequence_length under PipeFusion: it has to be
    # the number of text tokens that are really there.
    call.update(
        prompt_embeds=torch.randn(batch, TEXT_TOKENS, 32),
        pooled_prompt_embeds=torch.randn(batch, 32),
        max_sequence_length=TEXT_TOKENS,
    )
    return pipeline, call


def tiny_kontext(batch: int = 1, **sizes: Any) -> tuple[FluxKontextPipeline, dict[str, Any]]:
    """FLUX.1-Kontext: `tiny_flux`, and the 8 x 4 tokens of a picture to edit, given as latents."""
    # Without a VAE the pipeline takes its latents to have 16 channels, 64 in a token.
    pipeline, call = tiny_flux(
        batch=batch, pipeline_class=FluxKontextPipeline, channels=64, **sizes
    )
    call.update(image=torch.randn(batch, 16, 16, 8), max_area=128 * 128, _auto_resize=False)
    return pipeline, call


def tiny_fill(batch: int = 1, **sizes: Any) -> tuple[FluxFillPipeline, dict[str, Any]]:
    """FLUX.1-Fill: `tiny_flux` with the channels of a masked picture and a mask behind the noise.

    Its VAE makes latents of 4 channels, which are 16 in a token; the mask has 16 x 16 pixels there.
    """
    torch.manual_seed(1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=1,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    pipeline, call = tiny_flux(
        batch=batch, pipeline_class=FluxFillPipeline, condition_channels=16 + 256, vae=vae, **sizes
    )
    mask = torch.zeros(batch, 1, 128, 128)
    mask[..., 64:] = 1.0
    call.update(image=torch.rand(batch, 3, 128, 128), mask_image=mask)
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


def tiny_wan(
    seed: int = 0,
    batch: int = 1,
    size: int = 32,
    pipeline_class: type[Any] = WanPipeline,
    model_class: type[Any] = WanTransformer3DModel,
    experts: int = 1,
    **sizes: Any,
) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 T2V: 9 frames at 32 x 32 pixels with guidance: 3 x 2 x 2 tokens, two heads.

    Args:
        seed: of the weights, and of the embeddings.
        batch: videos.
        size: pixels of a side; 48 makes 27 tokens.
        pipeline_class, model_class: of diffusers.
        experts: 2 for Wan 2.2 A14B, which has one for much noise and one for little.
        **sizes: of the model; `expand_timesteps` is the pipeline's.
    """
    torch.manual_seed(seed)
    of_pipeline: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if "expand_timesteps" in sizes:
        of_pipeline["expand_timesteps"] = sizes.pop("expand_timesteps")
    if pipeline_class is not WanPipeline:
        of_pipeline["vae"] = tiny_wan_vae()
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "text_dim": 32,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 32,
        **sizes,
    }
    of_pipeline["transformer"] = model_class(**config).eval()
    if experts == 2:
        of_pipeline.update(transformer_2=model_class(**config).eval(), boundary_ratio=0.875)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    call = _call_kwargs(batch, size)
    call["num_frames"] = 9
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        call[name] = torch.randn(batch, TEXT_TOKENS, 32)
    return pipeline_class(scheduler=scheduler, **of_pipeline), call


def tiny_wan_vae() -> AutoencoderKLWan:
    """Return Wan's: a latent of 16 channels for 8 x 8 pixels of 4 frames."""
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


def tiny_wan_i2v(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 I2V: `tiny_wan` with the channels of a mask and a picture, which also is attended to.

    Its attention takes all text but the last 512 tokens for the picture's.
    """
    pipeline, call = tiny_wan(
        batch=batch,
        pipeline_class=WanImageToVideoPipeline,
        in_channels=16 + 4 + 16,
        image_dim=8,
        added_kv_proj_dim=16,
        **sizes,
    )
    embedded = torch.randn(1, 9, 8)
    pipeline.encode_image = lambda image, device=None: embedded
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        call[name] = torch.nn.functional.pad(call[name], (0, 0, 0, 512 - TEXT_TOKENS))
    return pipeline, {**call, "image": _picture(call["height"])}


def tiny_wan_ti2v(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """Wan 2.2 TI2V: `tiny_wan` with a timestep a token; the first frame's four are given."""
    pipeline, call = tiny_wan(
        batch=batch, pipeline_class=WanImageToVideoPipeline, expand_timesteps=True, **sizes
    )
    return pipeline, {**call, "image": _picture(call["height"])}


def tiny_wan_vace(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 VACE: `tiny_wan` with hints for two of its blocks; one video a call."""
    assert batch == 1
    pipeline, call = tiny_wan(
        pipeline_class=WanVACEPipeline,
        model_class=WanVACETransformer3DModel,
        vace_layers=[0, 2],
        **sizes,
    )
    return pipeline, {**call, "generator": call["generator"][0]}


def _picture(size: int) -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((size, size))


TINY_PIPELINES: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
    "flux": tiny_flux,
    "flux-kontext": tiny_kontext,
    "flux-fill": tiny_fill,
    "sd3": tiny_sd3,
    "sd3.5": tiny_sd35,
    "pixart": tiny_pixart,
    "pixart-sigma": partial(tiny_pixart, pipeline_class=PixArtSigmaPipeline),
    "wan": tiny_wan,
    "wan-i2v": tiny_wan_i2v,
    "wan-ti2v": tiny_wan_ti2v,
    "wan22": partial(tiny_wan, experts=2),
    "wan-vace": tiny_wan_vace,
}


@dataclass(frozen=True)
class Limit:
    """What xDiT cannot do uncached with one of these pipelines, though with others of its family.

    Attributes:
        model: a name of `TINY_PIPELINES`.
        flag: of the layouts that are left out, whatever its value.
        reason: in a sentence.
        error: what xDiT itself says.
    """

    model: str
    flag: str
    reason: str
    error: str


_NO_CLASS = "xDiT has no pipeline class for it, so that its runner's transformer cuts all by itself"
LIMITS = tuple(
    Limit(model, flag, _NO_CLASS, error)
    for model in ("flux-kontext", "flux-fill")
    for flag, error in (
        ("--pipefusion_parallel_degree=2", "is not supported by xFuser"),
        ("--use_cfg_parallel", "Cannot split dim 0 of hidden_states (1) into 2 parts"),
    )
)
# Those that no pipeline class of xDiT's stands around: it runs them by its runner.
OF_WAN = ("wan-i2v", "wan-ti2v", "wan22", "wan-vace")
OF_RUNNER = ("flux-kontext", "flux-fill", "wan", *OF_WAN)
# What xDiT can do with one of these, though not with the first of its family.
BEYOND = (("wan-i2v", "--use_cfg_parallel"), ("wan-ti2v", "--use_cfg_parallel"))
# Drawn one a call, so that there is no batch for replicas to share.
ALONE = ("wan-vace",)
# The registered adapter that each of them is for.
ADAPTER_OF = {
    "flux": "flux",
    "flux-kontext": "flux",
    "flux-fill": "flux",
    "sd3": "sd3",
    "sd3.5": "sd3",
    "pixart": "pixart",
    "pixart-sigma": "pixart",
    "wan": "wan",
    "wan-i2v": "wan",
    "wan-ti2v": "wan",
    "wan22": "wan",
    "wan-vace": "wan_vace",
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

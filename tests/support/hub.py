"""Tiny pipelines with all that xDiT's runner loads, in folders by the names that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLQwenImage
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    PaddleOCRVLProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from diffusers_adapters.tiny import TINY_PIPELINES
from diffusers_adapters.tiny.flux2 import tiny_flux2_vae
from diffusers_adapters.tiny.wan import tiny_wan, tiny_wan_i2v, tiny_wan_vace, tiny_wan_vae
from support.worlds import ROOT

TOY = ROOT / "toys" / "flux"
# Messages of any pipeline: their content is a text, or a list that begins with one. The first words
# are for HunyuanVideo-1.5, which leaves those of its own template out.
_TEMPLATE = (
    "{{ 'ring ' * 120 }}{% for m in messages %}"
    "{{ m.content if m.content is string else m.content[0].text }} {% endfor %}"
)
_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
_PICTURE = "<|image_pad|>"


def tokenizer() -> Any:
    """Return the toys': a token a word, and one for a picture."""
    found = AutoTokenizer.from_pretrained(
        TOY / "tokenizer_2", extra_special_tokens={"image_token": _PICTURE}
    )
    found.chat_template = _TEMPLATE
    return found


def _text(model: Any, config: Any, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return model(config(**{**_SMALL, **sizes})).eval()


def _seeing(model: Any, config: Any, **vision: Any) -> Any:
    """Return a text encoder that can be shown a picture."""
    sizes = {"depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16, **vision}
    text = {**_SMALL, "head_dim": 8, "rope_parameters": _ROPE}
    picture = tokenizer().image_token_id
    return model(config(text_config=text, vision_config=sizes, image_token_id=picture)).eval()


qwen3 = partial(_text, Qwen3Model, Qwen3Config, head_dim=8)


def wan_text() -> Any:
    return T5EncoderModel.from_pretrained(TOY / "text_encoder_2")


def qwen_vae() -> Any:
    """Return a VAE with 4 channels of latents for 8 x 8 pixels; its ends keep the size."""
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def image_vae() -> Any:
    """Return a VAE with 4 channels of latents for 8 x 8 pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=1,
        scaling_factor=0.4,
        shift_factor=0.1,
    ).eval()


def hunyuan_vae() -> Any:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def ltx2_vae() -> Any:
    """Return LTX-2's: a latent of 4 channels for 32 x 32 pixels of 8 frames."""
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ).eval()


def whole(name: str, **parts: Any) -> Any:
    """Return a tiny pipeline with its parts, and a tokenizer where it has none."""
    pipe, _ = TINY_PIPELINES[name]()
    if pipe.tokenizer is None:
        parts = {"tokenizer": tokenizer(), **parts}
    pipe.register_modules(**parts)
    return pipe


def _flux2(name: str) -> Any:
    """FLUX.2's text is three layers of its encoder's, as one embedding."""
    pipe, _ = TINY_PIPELINES[name](text_dim=3 * 16)
    text = _text(Qwen3ForCausalLM, Qwen3Config, head_dim=8, num_hidden_layers=30)
    pipe.register_modules(text_encoder=text, tokenizer=tokenizer())
    return pipe


def _kontext() -> Any:
    drawing = diffusers.FluxPipeline.from_pretrained(TOY)
    return diffusers.FluxKontextPipeline(**drawing.components)


def _qwen_edit() -> Any:
    """Its processor has none for videos, which Qwen's own has and torchvision is needed for."""
    seen = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
    return whole(
        "qwen-edit",
        vae=qwen_vae(),
        text_encoder=_seeing(
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLConfig,
            hidden_size=16,
            fullatt_block_indexes=[0],
        ),
        processor=PaddleOCRVLProcessor(image_processor=seen, tokenizer=tokenizer()),
    )


def _krea2(name: str) -> Any:
    text = _seeing(Qwen3VLModel, Qwen3VLConfig, hidden_size=8, deepstack_visual_indexes=[])
    return whole(name, vae=qwen_vae(), text_encoder=text)


def _wan(make: Any, **sizes: Any) -> Any:
    text = wan_text()
    pipe, _ = make(text_dim=text.config.d_model, **sizes)
    pipe.register_modules(vae=tiny_wan_vae(), text_encoder=text, tokenizer=tokenizer())
    if "image_encoder" in pipe.components and sizes.get("experts", 1) == 1:
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        config = CLIPVisionConfig(num_hidden_layers=2, image_size=16, patch_size=8, **vision)
        prepared = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
        pipe.register_modules(image_encoder=CLIPVisionModel(config), image_processor=prepared)
    return pipe


def _hunyuan_video() -> Any:
    return whole(
        "hunyuan-video",
        vae=hunyuan_vae(),
        text_encoder=_text(LlamaModel, LlamaConfig, num_hidden_layers=3),
        text_encoder_2=_text(CLIPTextModel, CLIPTextConfig, hidden_size=8),
        tokenizer_2=tokenizer(),
    )


def _hunyuan_video15() -> Any:
    text = {"num_hidden_layers": 3, "rope_parameters": _ROPE}
    two = T5Config(vocab_size=64, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    return whole(
        "hunyuan-video15",
        text_encoder=_text(Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig, **text),
        text_encoder_2=T5EncoderModel(two),
        tokenizer_2=tokenizer(),
    )


def _ltx2() -> Any:
    vocoder = LTX2Vocoder(
        in_channels=32,
        hidden_channels=8,
        upsample_kernel_sizes=[4],
        upsample_factors=[2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )
    return whole("ltx2", vae=ltx2_vae(), text_encoder=qwen3(num_hidden_layers=1), vocoder=vocoder)


def _beside_ltx2(hub: Path, lora: str, upsampler: str) -> None:
    """Save what LTX-2's second stage needs: a model that upsamples latents, and a LoRA."""
    made = LTX2LatentUpsamplerModel(in_channels=4, mid_channels=32, num_blocks_per_stage=1)
    made.save_pretrained(hub / upsampler / "latent_upsampler")
    if lora:
        (hub / lora).parent.mkdir(parents=True, exist_ok=True)
        layer = "transformer.transformer_blocks.0.attn1.to_q.lora"
        low = {f"{layer}_A.weight": torch.randn(2, 32), f"{layer}_B.weight": torch.randn(32, 2)}
        save_file(low, hub / lora)


def _beside_ltx25(hub: Path) -> None:
    """Save what LTX-2.5 needs: its full transformer and a decoder that is a diffusion model."""
    folder = hub / "Lightricks" / "LTX-2.5-Diffusers"
    _beside_ltx2(hub, "", str(folder))
    TINY_PIPELINES["ltx2"]()[0].transformer.save_pretrained(folder / "transformer_full")
    diffusers.LTX2VideoDiffusionDecoderModel(
        latent_channels=4,
        decoder_head_dim=8,
        decoder_stage_channels=(32, 16, 8, 8, 8),
        decoder_upsample_channel_reductions=(2, 2, 1, 1),
        decoder_stage_depths=(1, 1, 1, 1, 1),
        decoder_stage_kernels=((3, 3, 3),) * 4,
        decoder_stage5_kernel=(3, 3, 3),
        decoder_t_emb_dim=8,
    ).save_pretrained(folder / "diffusion_decoder")


# Name on the hub -> returns the pipeline that lies there.
HUB: dict[str, Callable[[], Any]] = {
    "black-forest-labs/FLUX.1-Kontext-dev": _kontext,
    "black-forest-labs/FLUX.2-dev": partial(_flux2, "flux2"),
    "black-forest-labs/FLUX.2-klein-4B": partial(_flux2, "klein"),
    "Qwen/Qwen-Image": lambda: whole("qwen", vae=qwen_vae(), text_encoder=qwen3()),
    "Qwen/Qwen-Image-Edit": _qwen_edit,
    "Tongyi-MAI/Z-Image": lambda: whole("z-image", vae=image_vae(), text_encoder=qwen3()),
    "Tongyi-MAI/Z-Image-Turbo": lambda: whole(
        "z-image-turbo", vae=image_vae(), text_encoder=qwen3()
    ),
    "Alpha-VLLM/Lumina-Image-2.0": lambda: whole(
        "lumina2", vae=image_vae(), text_encoder=_text(Gemma2Model, Gemma2Config, head_dim=8)
    ),
    "krea/krea-2-raw": partial(_krea2, "krea2"),
    "krea/krea-2-turbo": partial(_krea2, "krea2-turbo"),
    "ideogram-ai/ideogram-4-fp8": lambda: whole("ideogram4", vae=tiny_flux2_vae()),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": partial(_wan, tiny_wan),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": partial(_wan, tiny_wan_i2v),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": partial(_wan, tiny_wan, experts=2),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": partial(_wan, tiny_wan, experts=2, in_channels=36),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": partial(_wan, tiny_wan, expand_timesteps=True),
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": partial(_wan, tiny_wan_vace),
    "tencent/HunyuanVideo": _hunyuan_video,
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v": _hunyuan_video15,
    "Lightricks/LTX-2": _ltx2,
    "dg845/LTX-2.3-Diffusers": _ltx2,
    "Lightricks/LTX-2.5-Diffusers": _ltx2,
}
# What lies beside it.
_BESIDE: dict[str, Callable[[Path], None]] = {
    "Lightricks/LTX-2": partial(
        _beside_ltx2,
        lora="Lightricks/LTX-2/ltx-2-19b-distilled-lora-384.safetensors",
        upsampler="Lightricks/LTX-2",
    ),
    "dg845/LTX-2.3-Diffusers": partial(
        _beside_ltx2,
        lora="Lightricks/LTX-2.3/ltx-2.3-22b-distilled-lora-384.safetensors",
        upsampler="dg845/LTX-2.3-Spatial-Upsampler-Diffusers",
    ),
    "Lightricks/LTX-2.5-Diffusers": _beside_ltx25,
}


def save(name: str, hub: Path) -> Path:
    """Save a pipeline with all that it needs; return its folder.

    Args:
        name: on the hub.
        hub: folder in which the names of the hub are paths.
    """
    HUB[name]().save_pretrained(hub / name)
    if name in _BESIDE:
        _BESIDE[name](hub)
    return hub / name

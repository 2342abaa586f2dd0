"""LTX-2."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs


def tiny_ltx2(
    seed: int = 0, batch: int = 1, size: int = 256, num_layers: int = 4
) -> tuple[LTX2Pipeline, dict[str, Any]]:
    """LTX-2 with its three guidances, in three calls a step: 32 tokens of video, 18 of audio.

    Both of guidance in one batch, then one with a block that attends to nothing, then one with
    video and audio apart. A VAE makes a latent pixel of 64 x 64, and a latent frame of 16. Of 192
    pixels a side it is one frame of 9 tokens.
    """
    torch.manual_seed(seed)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=num_layers,
        caption_channels=16,
        perturbed_attn=True,
        rope_type="split",
    ).eval()
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        rope_type="split",
    ).eval()
    video = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
    ).eval()
    audio = AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16
    ).eval()
    pipeline = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=video,
        audio_vae=audio,
        connectors=connectors,
        transformer=transformer,
        **dict.fromkeys(("text_encoder", "tokenizer", "vocoder")),
    )
    call = {**call_kwargs(batch, size), "num_frames": 17 if size > 192 else 1, "frame_rate": 24.0}
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, TEXT_TOKENS, 32)
        call[f"{prefix}prompt_attention_mask"] = torch.ones(batch, TEXT_TOKENS)
    call["spatio_temporal_guidance_blocks"] = [2]
    return pipeline, call


MODELS = {"ltx2": TinyModel(tiny_ltx2, "ltx2", of_runner=True)}

"""CogVideoX and ConsisID."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
)

# `diffusers.ConsisIDPipeline` wants OpenCV, which draws the key points of a face; none are drawn.
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs, picture


def tiny_cogvideox(
    seed: int = 0,
    batch: int = 1,
    size: int = 64,
    pipeline_class: type[Any] = CogVideoXPipeline,
    model_class: type[Any] = CogVideoXTransformer3DModel,
    **sizes: Any,
) -> tuple[Any, dict[str, Any]]:
    """CogVideoX: 9 frames at 64 x 64 pixels, guidance in the batch: 3 x 4 x 4 tokens, two heads.

    Args:
        seed: of the weights, and of the embeddings.
        batch: videos.
        size: pixels of a side; 48 makes 27 tokens.
        pipeline_class, model_class: of diffusers.
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
    pipeline = pipeline_class(
        transformer=model_class(**config).eval(),
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


def tiny_consisid(batch: int = 1, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """ConsisID: `tiny_cogvideox` with a picture behind the noise, and one face for all videos."""
    face = {
        "in_channels": 8,
        "is_train_face": True,
        "cross_attn_dim_head": 8,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 12,
        "LFE_vit_dim": 16,
        "LFE_depth": 5,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_querie": 4,
        "LFE_output_dim": 21,  # two thirds of the width
    }
    classes = {"pipeline_class": ConsisIDPipeline, "model_class": ConsisIDTransformer3DModel}
    pipeline, call = tiny_cogvideox(batch=batch, **classes, **{**face, **sizes})
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    pipeline.register_modules(vae=vae)
    call["image"] = [picture(call["height"])] * batch
    call["id_cond"] = torch.randn(1, 12)
    call["id_vit_hidden"] = tuple(torch.randn(1, 3, 16) for _ in range(5))
    return pipeline, call


MODELS = {
    "cogvideox": TinyModel(tiny_cogvideox, "cogvideox"),
    "consisid": TinyModel(tiny_consisid, "consisid"),
}

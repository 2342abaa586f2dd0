"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from diffusers_adapters.tiny.model import TEXT_TOKENS, Limit, TinyModel, call_kwargs


class ZImageTurboPipeline(ZImagePipeline):
    """By its name xDiT's runner knows that there is no guidance."""


def tiny_z_image(
    seed: int = 0,
    batch: int = 1,
    size: int = 64,
    text: tuple[int, int] = (TEXT_TOKENS, TEXT_TOKENS - 2),
    pipeline_class: type[ZImagePipeline] = ZImagePipeline,
    **sizes: Any,
) -> tuple[ZImagePipeline, dict[str, Any]]:
    """Z-Image at 64 x 64 pixels: 4 x 4 image tokens and 8 text tokens, each padded to 32.

    Args:
        seed: of the weights, and of the embeddings.
        batch: pictures.
        size: pixels of a side; 96 makes 36 tokens.
        text: tokens of the prompt, and of the negative one.
        pipeline_class: Turbo's has a single branch.
        **sizes: of the model.
    """
    torch.manual_seed(seed)
    config = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
        **sizes,
    }
    transformer = ZImageTransformer2DModel(**config).eval()
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_()  # diffusers 0.37 leaves them as memory was
    pipeline = pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=transformer,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    guidance = 4.0 if pipeline_class is ZImagePipeline else 0.0
    call = {**call_kwargs(batch, size), "guidance_scale": guidance}
    for prefix, tokens in zip(("", "negative_"), text, strict=True):
        call[f"{prefix}prompt_embeds"] = [torch.randn(tokens, 16) for _ in range(batch)]
    return pipeline, call


_ONE_BRANCH = Limit(
    "--use_cfg_parallel",
    "Turbo is distilled and draws without guidance: there is no second branch to share out",
    "does not support use_cfg_parallel",
)
MODELS = {
    "z-image": TinyModel(tiny_z_image, "z_image", of_runner=True),
    "z-image-turbo": TinyModel(
        partial(tiny_z_image, pipeline_class=ZImageTurboPipeline),
        "z_image",
        of_runner=True,
        limits=(_ONE_BRANCH,),
    ),
}

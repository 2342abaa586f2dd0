"""PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xfuser_fastcache.benchmarks.gpu.families.base import Family, Shape, guided, plain_plan

_CONFIG = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "attention_head_dim": 72,
    "num_attention_heads": 16,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}


def _scheduler() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")


def _inputs(shape: Shape, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    text = draw(2, shape.text_tokens, shape.config["caption_channels"])
    mask = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
    # The prompt fills a third, the empty one a single token, as tokenizers pad them.
    mask[0, 1:] = 0
    mask[1, shape.text_tokens // 3 :] = 0
    return {
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _call(
    model: Any, latents: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    both = torch.cat([latents] * 2)
    time = timestep[None].to(both.device).expand(both.shape[0])
    predicted = guided(model(both, timestep=time, return_dict=False, **inputs)[0])
    # The other half is a learned variance.
    return predicted.chunk(2, dim=1)[0]


PIXART = Family(
    title="PixArt-Sigma, 1024 x 1024, with guidance",
    model_class="PixArtTransformer2DModel",
    scheduler=_scheduler,
    plan=plain_plan,
    inputs=_inputs,
    call=_call,
    full=Shape(_CONFIG, (4, 128, 128), 300, 1152, 4096),
    small=Shape(
        _CONFIG
        | {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"cross_attention_dim": 32, "caption_channels": 32, "sample_size": 16}
        | {"interpolation_scale": 1},
        (4, 16, 16),
        8,
        32,
        64,
    ),
    batch=2,
    toy={"guidance_scale": 2.5, "use_resolution_binning": False, "clean_caption": False},
    toy_steps=12,
)

"""FLUX.1-dev."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from xfuser_fastcache.benchmarks.gpu.families.base import Family, Shape

_CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def _plan(scheduler: Any, steps: int, device: torch.device, shape: Shape) -> None:
    # The pipeline's `calculate_shift`: a line through (256, 0.5) and (4096, 1.15).
    mu = 0.5 + (shape.image_tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=mu)
    scheduler.set_begin_index(0)


def _inputs(shape: Shape, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    like = draw(1)
    side = round(shape.image_tokens**0.5)
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None, :]
    return {
        "encoder_hidden_states": draw(1, shape.text_tokens, shape.config["joint_attention_dim"]),
        "pooled_projections": draw(1, shape.config["pooled_projection_dim"]),
        "txt_ids": torch.zeros(shape.text_tokens, 3).to(like),
        "img_ids": ids.reshape(-1, 3).to(like),
        "guidance": torch.full([1], 3.5, dtype=torch.float32, device=like.device),
    }


def _call(
    model: Any, latents: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    time = timestep.expand(latents.shape[0]).to(latents.dtype) / 1000
    return model(hidden_states=latents, timestep=time, return_dict=False, **inputs)[0]


FLUX = Family(
    title="FLUX.1-dev, 1024 x 1024",
    model_class="FluxTransformer2DModel",
    scheduler=_scheduler,
    plan=_plan,
    inputs=_inputs,
    call=_call,
    full=Shape(_CONFIG, (4096, 64), 512, 3072, 4096),
    small=Shape(
        _CONFIG
        | {"joint_attention_dim": 32, "pooled_projection_dim": 32}
        | {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}
        | {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
        (64, 64),
        8,
        32,
        64,
    ),
    toy={"max_sequence_length": 32},
    toy_steps=10,
)

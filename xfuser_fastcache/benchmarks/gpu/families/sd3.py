"""SD3.5-medium."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xfuser_fastcache.benchmarks.gpu.families.base import Family, Shape, guided, plain_plan

_CONFIG = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _inputs(shape: Shape, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "encoder_hidden_states": draw(2, shape.text_tokens, shape.config["joint_attention_dim"]),
        "pooled_projections": draw(2, shape.config["pooled_projection_dim"]),
    }


def _call(
    model: Any, latents: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    both = torch.cat([latents] * 2)
    time = timestep.expand(both.shape[0])
    return guided(model(hidden_states=both, timestep=time, return_dict=False, **inputs)[0])


SD3 = Family(
    title="SD3.5-medium, 1024 x 1024, with guidance",
    model_class="SD3Transformer2DModel",
    scheduler=_scheduler,
    plan=plain_plan,
    inputs=_inputs,
    call=_call,
    full=Shape(_CONFIG, (16, 128, 128), 333, 1536, 4096),
    small=Shape(
        _CONFIG
        | {"joint_attention_dim": 32, "pooled_projection_dim": 32}
        | {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"caption_projection_dim": 32, "sample_size": 16, "pos_embed_max_size": 16}
        | {"dual_attention_layers": (0, 1)},
        (16, 16, 16),
        8,
        32,
        64,
    ),
    batch=2,
    toy={"max_sequence_length": 32, "guidance_scale": 2.5},
    toy_steps=12,
)

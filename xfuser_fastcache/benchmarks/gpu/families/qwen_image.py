"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from xfuser_fastcache.benchmarks.gpu.families.base import Family, Shape, two_calls

_CONFIG = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )


def _plan(scheduler: Any, steps: int, device: torch.device, shape: Shape) -> None:
    # The pipeline's `calculate_shift`: a line through (256, 0.5) and (8192, 0.9).
    mu = 0.5 + (shape.image_tokens - 256) * (0.9 - 0.5) / (8192 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=mu)
    scheduler.set_begin_index(0)


def _inputs(shape: Shape, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    # A prompt and an empty one: of their own lengths, as its tokenizer gives them.
    side = round(shape.image_tokens**0.5)
    return {
        "img_shapes": [[(1, side, side)]],
        "text": {
            "cond": draw(1, shape.text_tokens, shape.config["joint_attention_dim"]),
            "uncond": draw(1, shape.text_tokens // 4, shape.config["joint_attention_dim"]),
        },
    }


def _call(
    model: Any, latents: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    time = timestep.expand(latents.shape[0]).to(latents.dtype) / 1000

    def predict(text: torch.Tensor) -> torch.Tensor:
        return model(
            hidden_states=latents,
            timestep=time,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None,
            img_shapes=inputs["img_shapes"],
            return_dict=False,
        )[0]

    return two_calls(model, predict, inputs["text"])


QWEN_IMAGE = Family(
    title="Qwen-Image, 1024 x 1024, with guidance by two calls",
    model_class="QwenImageTransformer2DModel",
    scheduler=_scheduler,
    plan=_plan,
    inputs=_inputs,
    call=_call,
    full=Shape(_CONFIG, (4096, 64), 128, 3072, 4096),
    small=Shape(
        _CONFIG
        | {"in_channels": 16, "out_channels": 4, "num_layers": 3, "num_attention_heads": 2}
        | {"attention_head_dim": 16, "axes_dims_rope": (8, 4, 4), "joint_attention_dim": 16},
        (16, 16),
        8,
        32,
        16,
    ),
    long=True,
)

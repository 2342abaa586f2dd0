"""Wan 2.1 text to video, both sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xfuser_fastcache.benchmarks.gpu.families.base import Family, Shape, plain_plan, two_calls

_CONFIG = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
_SMALL = Shape(
    _CONFIG
    | {"num_attention_heads": 2, "attention_head_dim": 8, "ffn_dim": 32, "num_layers": 3}
    | {"text_dim": 32, "freq_dim": 16, "rope_max_seq_len": 32},
    (16, 3, 4, 4),
    8,
    16,
    12,
)


def _scheduler() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def _inputs(shape: Shape, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    size = (1, shape.text_tokens, shape.config["text_dim"])
    return {"text": {"cond": draw(*size), "uncond": draw(*size)}}


def _call(
    model: Any, latents: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    time = timestep.expand(latents.shape[0])

    def predict(text: torch.Tensor) -> torch.Tensor:
        return model(
            hidden_states=latents, timestep=time, encoder_hidden_states=text, return_dict=False
        )[0]

    return two_calls(model, predict, inputs["text"])


def _wan(title: str, config: dict[str, Any], frames: int) -> Family:
    """Return a family of 480 x 832 pixels, 60 x 104 in the latent.

    Args:
        title: for people.
        config: of its transformer, beside what all have in common.
        frames: of the latent, one and one more for every four frames of the clip.
    """
    width = config["num_attention_heads"] * _CONFIG["attention_head_dim"]
    tokens = frames * 30 * 52
    return Family(
        title=title,
        model_class="WanTransformer3DModel",
        scheduler=_scheduler,
        plan=plain_plan,
        inputs=_inputs,
        call=_call,
        full=Shape(_CONFIG | config, (16, frames, 60, 104), 512, width, tokens),
        small=_SMALL,
        long=True,
    )


WAN_1_3B = _wan(
    "Wan 2.1 T2V 1.3B, 480 x 832 x 81 frames, with guidance by two calls",
    {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    21,
)
WAN_14B = _wan(
    "Wan 2.1 T2V 14B, 480 x 832 x 17 frames, with guidance by two calls",
    {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    5,
)

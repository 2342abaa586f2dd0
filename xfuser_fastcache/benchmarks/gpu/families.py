"""The families of models that are measured: real shapes, what a call is given, and its scheduler.

Another family is another row of `FAMILIES`. Weights and inputs are random, so that nothing is
downloaded; a pipeline's own conventions of time steps and guidance hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

GUIDANCE_SCALE = 4.5


@dataclass(frozen=True)
class Shape:
    """Sizes of one model and of what it is called with.

    Attributes:
        config: arguments of the diffusers transformer.
        latents: of one picture, without the batch.
        text_tokens: that a prompt is padded to.
        width: channels of a token between blocks.
        image_tokens: of one picture.
    """

    config: dict[str, Any]
    latents: tuple[int, ...]
    text_tokens: int
    width: int
    image_tokens: int


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        title: for people.
        model_class: name of the diffusers transformer.
        scheduler: makes the diffusers scheduler.
        plan: `(scheduler, steps, device, shape)` plans a generation, as the pipeline does.
        inputs: `(shape, draw)` makes what stays the same at all steps; `draw(*size)` is noise.
        call: `(model, latents, timestep, inputs)` returns the predicted noise.
        full: the real sizes.
        small: sizes for a rehearsal.
        batch: pictures that one call of the transformer carries, 2 with guidance.
        toy: arguments of a call of the embedded toy's pipeline at 128 px.
        toy_steps: computed steps of the mask in the toy's calibration.
    """

    title: str
    model_class: str
    scheduler: Callable[[], Any]
    plan: Callable[[Any, int, torch.device, Shape], None]
    inputs: Callable[[Shape, Callable[..., torch.Tensor]], dict[str, Any]]
    call: Callable[[Any, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
    full: Shape
    small: Shape
    batch: int = 1
    toy: dict[str, Any] = field(default_factory=dict)
    toy_steps: int = 10


def _guided(predicted: torch.Tensor) -> torch.Tensor:
    without, within = predicted.chunk(2)
    return without + GUIDANCE_SCALE * (within - without)


# ---- FLUX.1 -------------------------------------------------------------------------------------


def _flux_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def _flux_plan(scheduler: Any, steps: int, device: torch.device, shape: Shape) -> None:
    # The pipeline's `calculate_shift`: a line through (256, 0.5) and (4096, 1.15).
    mu = 0.5 + (shape.image_tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=mu)
    scheduler.set_begin_index(0)


def _flux_inputs(shape: Shape, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
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


def _flux_call(
    model: Any, latents: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    time = timestep.expand(latents.shape[0]).to(latents.dtype) / 1000
    return model(hidden_states=latents, timestep=time, return_dict=False, **inputs)[0]


# ---- SD3.5 --------------------------------------------------------------------------------------


def _sd3_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _plain_plan(scheduler: Any, steps: int, device: torch.device, shape: Shape) -> None:
    scheduler.set_timesteps(steps, device=device)


def _sd3_inputs(shape: Shape, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "encoder_hidden_states": draw(2, shape.text_tokens, shape.config["joint_attention_dim"]),
        "pooled_projections": draw(2, shape.config["pooled_projection_dim"]),
    }


def _sd3_call(
    model: Any, latents: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    both = torch.cat([latents] * 2)
    time = timestep.expand(both.shape[0])
    return _guided(model(hidden_states=both, timestep=time, return_dict=False, **inputs)[0])


# ---- PixArt-Sigma -------------------------------------------------------------------------------


def _pixart_scheduler() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")


def _pixart_inputs(shape: Shape, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
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


def _pixart_call(
    model: Any, latents: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    both = torch.cat([latents] * 2)
    time = timestep[None].to(both.device).expand(both.shape[0])
    predicted = _guided(model(both, timestep=time, return_dict=False, **inputs)[0])
    # The other half is a learned variance.
    return predicted.chunk(2, dim=1)[0]


# ---- all of them --------------------------------------------------------------------------------

_FLUX = {
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
_SD3 = {
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
_PIXART = {
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
_SMALL_TEXT = {"joint_attention_dim": 32, "pooled_projection_dim": 32}

FAMILIES: dict[str, Family] = {
    "flux": Family(
        title="FLUX.1-dev, 1024 x 1024",
        model_class="FluxTransformer2DModel",
        scheduler=_flux_scheduler,
        plan=_flux_plan,
        inputs=_flux_inputs,
        call=_flux_call,
        full=Shape(_FLUX, (4096, 64), 512, 3072, 4096),
        small=Shape(
            _FLUX
            | _SMALL_TEXT
            | {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}
            | {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
            (64, 64),
            8,
            32,
            64,
        ),
        toy={"max_sequence_length": 32},
        toy_steps=10,
    ),
    "sd3": Family(
        title="SD3.5-medium, 1024 x 1024, with guidance",
        model_class="SD3Transformer2DModel",
        scheduler=_sd3_scheduler,
        plan=_plain_plan,
        inputs=_sd3_inputs,
        call=_sd3_call,
        full=Shape(_SD3, (16, 128, 128), 333, 1536, 4096),
        small=Shape(
            _SD3
            | _SMALL_TEXT
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
    ),
    "pixart": Family(
        title="PixArt-Sigma, 1024 x 1024, with guidance",
        model_class="PixArtTransformer2DModel",
        scheduler=_pixart_scheduler,
        plan=_plain_plan,
        inputs=_pixart_inputs,
        call=_pixart_call,
        full=Shape(_PIXART, (4, 128, 128), 300, 1152, 4096),
        small=Shape(
            _PIXART
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
    ),
}

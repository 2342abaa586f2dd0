"""Stable Diffusion 3 and 3.5: joint blocks that carry image and text; the last one drops text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xfuser_fastcache.block_contract import ENCODER, HIDDEN, BlockContract, ModelAdapter, Step

_BLOCK = BlockContract(
    parameters=(HIDDEN, ENCODER, "temb", "joint_attention_kwargs"), returns=(ENCODER, HIDDEN)
)
_TIMESTEP = 3
_TRAIN_TIMESTEPS = 1000


class SD3Adapter(ModelAdapter):
    """SD3 as diffusers' `SD3Transformer2DModel` and as xfuser's wrapper around it.

    The last block is `context_pre_only` and returns None for the text, which the engine leaves
    out of anchors and forecasts; blocks with dual attention (SD3.5) are called alike.

    Source: diffusers `models/transformers/transformer_sd3.py`, `models/attention.py`.
    """

    block_lists = {"transformer_blocks": _BLOCK}

    @classmethod
    def model_names(cls) -> tuple[str, ...]:
        """Names of the supported transformer classes."""
        return ("SD3Transformer2DModel",)

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Say whether `model` is an SD3 transformer."""
        from diffusers import SD3Transformer2DModel

        return isinstance(model, SD3Transformer2DModel)

    @classmethod
    def dim(cls, model: Any) -> int:
        """Width of a token inside the blocks."""
        return model.inner_dim

    @classmethod
    def timestep(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The fourth parameter of the transformer's forward; 1000 times sigma."""
        return args[_TIMESTEP] if len(args) > _TIMESTEP else kwargs["timestep"]

    @classmethod
    def noise_level(cls, timestep: float) -> float:
        """Sigma (0 to 1)."""
        return timestep / _TRAIN_TIMESTEPS

    @classmethod
    def plan(cls, scheduler: Any) -> list[Step]:
        """Every planned step; the scheduler appends a final sigma of 0, which is no step."""
        count = len(scheduler.timesteps)
        sigmas = scheduler.sigmas[:count].tolist()
        return [Step(t, s) for t, s in zip(scheduler.timesteps.tolist(), sigmas, strict=True)]

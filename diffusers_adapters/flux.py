"""FLUX.1: double-stream blocks, then single-stream blocks; both carry image and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xfuser_fastcache.block_contract import ENCODER, HIDDEN, BlockContract, ModelAdapter, Step

# Since diffusers 0.35 both kinds of block take the two streams and return them text first.
_BLOCK = BlockContract(
    parameters=(HIDDEN, ENCODER, "temb", "image_rotary_emb", "joint_attention_kwargs"),
    returns=(ENCODER, HIDDEN),
)
_TIMESTEP = 3


class FluxAdapter(ModelAdapter):
    """FLUX.1 as diffusers' `FluxTransformer2DModel` and as xfuser's wrapper around it.

    Source: diffusers `models/transformers/transformer_flux.py`.
    """

    block_lists = {"transformer_blocks": _BLOCK, "single_transformer_blocks": _BLOCK}

    @classmethod
    def model_names(cls) -> tuple[str, ...]:
        """Names of the supported transformer classes."""
        return ("FluxTransformer2DModel",)

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Say whether `model` is a FLUX transformer."""
        from diffusers import FluxTransformer2DModel

        return isinstance(model, FluxTransformer2DModel)

    @classmethod
    def dim(cls, model: Any) -> int:
        """Width of a token inside the blocks."""
        return model.inner_dim

    @classmethod
    def timestep(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The fourth parameter of the transformer's forward; sigma, in the model's dtype."""
        return args[_TIMESTEP] if len(args) > _TIMESTEP else kwargs["timestep"]

    @classmethod
    def noise_level(cls, timestep: float) -> float:
        """FLUX is given sigma itself (0 to 1)."""
        return timestep

    @classmethod
    def plan(cls, scheduler: Any) -> list[Step]:
        """Every planned step; the scheduler appends a final sigma of 0, which is no step."""
        count = len(scheduler.timesteps)
        return [Step(sigma, sigma) for sigma in scheduler.sigmas[:count].tolist()]

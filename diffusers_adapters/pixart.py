"""PixArt-Alpha and -Sigma: blocks that carry image tokens alone; text comes by cross-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter, Step
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.streams import ENCODER, HIDDEN

_BLOCK = BlockContract(
    parameters=(HIDDEN, "attention_mask", ENCODER, "encoder_attention_mask", "timestep"),
    returns=(HIDDEN,),
    attention=("attn1",),
)
# The noise schedule that PixArt was trained with: betas rise linearly.
_BETAS = (0.0001, 0.02, 1000)


def _level(alphas_cumprod: list[float], timestep: float) -> float:
    alpha = alphas_cumprod[min(max(round(timestep), 0), len(alphas_cumprod) - 1)]
    return math.atan(math.sqrt((1 - alpha) / alpha))


@cache
def _alphas_cumprod() -> list[float]:
    return torch.cumprod(1 - torch.linspace(*_BETAS, dtype=torch.float64), dim=0).tolist()


class PixArtAdapter(ModelAdapter):
    """PixArt as diffusers' `PixArtTransformer2DModel` and as xfuser's wrapper around it.

    Its schedulers need not have a sigma. The variable of forecasts is the angle
    atan(sqrt((1 - a) / a)), in radians, a being the cumulative product of alphas: a latent is the
    picture times its cosine plus noise times its sine, so change grows with the angle alike at
    every step. Forecasts in it are 3 to 5 dB better than in its tangent
    (docs/decisions/noise-angle.md).

    Source: diffusers `models/transformers/pixart_transformer_2d.py`; betas from the scheduler
    configuration of PixArt-alpha.
    """

    model_class = "PixArtTransformer2DModel"
    timestep_index = 2
    embedder = "adaln_single"
    block_lists = {"transformer_blocks": _BLOCK}

    @classmethod
    def noise_level(cls, timestep: float) -> float:
        """The angle by the published schedule, where no scheduler is at hand."""
        return _level(_alphas_cumprod(), timestep)

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, shifted and scaled by its own table and the timestep's."""
        x = _BLOCK.argument(HIDDEN, args, kwargs)
        timestep = _BLOCK.argument("timestep", args, kwargs)
        table = block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
        shift, scale = table[:, :1], table[:, 1:2]
        return block.norm1(x) * (1 + scale) + shift

    @classmethod
    def plan(cls, scheduler: Any) -> list[Step]:
        """Every planned step with the angle by the scheduler's own schedule."""
        alphas = scheduler.alphas_cumprod.tolist()
        return [Step(t, _level(alphas, t)) for t in scheduler.timesteps.tolist()]

"""PixArt-Alpha and -Sigma: blocks that carry image tokens alone; text comes by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.noise import NoiseAngle
from xfuser_fastcache.models.streams import HIDDEN


class PixArtAdapter(ModelAdapter):
    """PixArt as diffusers' `PixArtTransformer2DModel` and as xfuser's wrapper around it.

    Its schedulers need not have a sigma; the variable of forecasts is the noise angle.

    Source: diffusers `models/transformers/pixart_transformer_2d.py`; betas from the scheduler
    configuration of PixArt-alpha.
    """

    model_class = "PixArtTransformer2DModel"
    embedder = "adaln_single"
    block_lists = {"transformer_blocks": BlockContract(attention=("attn1",))}
    noise = NoiseAngle(betas=(0.0001, 0.02))

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, shifted and scaled by its own table and the timestep's."""
        contract = cls.first_contract(block)
        x = contract.argument(HIDDEN, args, kwargs)
        timestep = contract.argument("timestep", args, kwargs)
        table = block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
        shift, scale = table[:, :1], table[:, 1:2]
        return block.norm1(x) * (1 + scale) + shift

"""PixArt-Alpha and -Sigma: blocks that carry image tokens alone; text comes by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.modulation import by_own_table
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
        x, timestep = (contract.argument(name, args, kwargs) for name in (HIDDEN, "timestep"))
        return by_own_table(block, x, timestep)

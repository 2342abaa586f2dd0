"""Latte: blocks over the tokens of a frame take turns with blocks over the frames of a place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.modulation import by_own_table
from xfuser_fastcache.models.noise import NoiseAngle
from xfuser_fastcache.models.streams import HIDDEN


class LatteAdapter(ModelAdapter):
    """Latte as diffusers' `LatteTransformer3DModel` and as xfuser's wrapper around it.

    The output forecast skips all of it, others the blocks over a frame's tokens alone: those
    over frames, which hold the same tokens the other way round, run at every step then.

    Source: diffusers `models/transformers/latte_transformer_3d.py`, `pipelines/latte`; betas from
    the scheduler configuration of Latte-1.
    """

    model_class = "LatteTransformer3DModel"
    embedder = "adaln_single"
    block_lists = {"transformer_blocks": BlockContract(returns=(HIDDEN,))}
    narrows = False
    noise = NoiseAngle(betas=(0.0001, 0.02))
    forecaster = "output"
    guided_whole = True

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, shifted and scaled by its own table and the timestep's."""
        contract = cls.first_contract(block)
        x, timestep = (contract.argument(name, args, kwargs) for name in (HIDDEN, "timestep"))
        return by_own_table(block, x, timestep)

"""HunyuanDiT: blocks of image tokens alone, the later ones with what earlier ones put out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.noise import NoiseAngle
from xfuser_fastcache.models.streams import HIDDEN


class HunyuanDiTAdapter(ModelAdapter):
    """HunyuanDiT as diffusers' `HunyuanDiT2DModel` and as xfuser's wrapper around it.

    A block of the second half also takes what one of the first half has put out. So all of them
    are one span: both are computed at a step, or neither is.

    Source: diffusers `models/transformers/hunyuan_transformer_2d.py`; betas from the scheduler
    configuration of HunyuanDiT.
    """

    model_class = "HunyuanDiT2DModel"
    embedder = "time_extra_emb"
    block_lists = {"blocks": BlockContract(returns=(HIDDEN,))}
    narrows = False
    long_skips = True
    noise = NoiseAngle(betas=(0.00085, 0.02), spacing="scaled_linear")

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, shifted by the timestep."""
        contract = cls.first_contract(block)
        return block.norm1(*(contract.argument(name, args, kwargs) for name in (HIDDEN, "temb")))

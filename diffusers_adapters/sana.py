"""SANA: blocks that carry image tokens alone; text comes by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter, Step
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.modulation import by_own_table
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import HIDDEN


class SanaAdapter(ModelAdapter):
    """SANA as diffusers' `SanaTransformer2DModel` and as xfuser's wrapper around it.

    A block ends in a convolution over the picture, so that no token plan can leave tokens out.
    SANA Sprint is this model too; its one to four steps leave nothing to skip.

    Source: diffusers `models/transformers/sana_transformer.py`, `pipelines/sana`.
    """

    model_class = "SanaTransformer2DModel"
    embedder = "time_embed"
    block_lists = {"transformer_blocks": BlockContract(returns=(HIDDEN,))}
    narrows = False
    noise = FlowSigma(given="timestep")

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, shifted and scaled by its own table and the timestep's."""
        contract = cls.first_contract(block)
        x, timestep = (contract.argument(name, args, kwargs) for name in (HIDDEN, "timestep"))
        return by_own_table(block, x, timestep)

    @classmethod
    def plan(cls, scheduler: Any) -> list[Step]:
        """Return every planned step; timesteps of Sprint's scheduler are its noise levels."""
        if hasattr(scheduler, "sigmas"):
            return super().plan(scheduler)
        return [Step(t, t) for t in scheduler.timesteps.tolist()]

"""Ideogram-4: single-stream blocks over text and image as one tensor, a model for each branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import HIDDEN

_IMAGE = 2  # OUTPUT_IMAGE_INDICATOR of diffusers' module


class Ideogram4Adapter(ModelAdapter):
    """Ideogram-4 as diffusers' `Ideogram4Transformer2DModel` and as xfuser's subclass of it.

    The branch without text is another model, which is given the image alone. In the sequence of the
    other one the image stands behind the text, and that behind padding, which xfuser leaves out.

    Source: diffusers `models/transformers/transformer_ideogram4.py`, `pipelines/ideogram4`.
    """

    model_class = "Ideogram4Transformer2DModel"
    embedder = "t_embedding"
    block_lists = {"layers": BlockContract(returns=(HIDDEN,))}
    narrows = False  # the mask of a block has all tokens twice
    noise = FlowSigma(given="time")
    branches_apart = True  # a step has one forward pass of each model

    @classmethod
    def latent_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> range:
        """Those marked as image, the last ones of each item's."""
        marks = cls.forward_layout().argument("indicator", args, kwargs)[0]
        return range(len(marks) - int((marks == _IMAGE).sum()), len(marks))

    @classmethod
    def image_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> range:
        """Those that the blocks are given of them; xfuser's are given no padding."""
        found = cls.latent_tokens(model, args, kwargs)
        padding = getattr(model, "_num_pad_tokens", 0)
        return range(found.start - padding, found.stop - padding)

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, scaled by the timestep."""
        contract = cls.first_contract(block)
        x, given = (contract.argument(name, args, kwargs) for name in (HIDDEN, "adaln_input"))
        scale = block.adaln_modulation(given).chunk(4, dim=-1)[0]
        return block.attention_norm1(x) * (1.0 + scale)

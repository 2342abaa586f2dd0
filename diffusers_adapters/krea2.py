"""Krea-2: single-stream blocks over text and image as one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract, Table
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import ENCODER, HIDDEN


class Krea2Adapter(ModelAdapter):
    """Krea-2 Raw and Turbo as diffusers' `Krea2Transformer2DModel` and xfuser's subclass of it.

    Text stands ahead of the image, and xfuser cuts both as one: a rank may hold some of each, or
    text alone. So the text counts as rows around the image's. The text fusion ahead of the blocks
    runs at every step; the output forecast skips it.

    Source: diffusers `models/transformers/transformer_krea2.py`, `pipelines/krea2`.
    """

    model_class = "Krea2Transformer2DModel"
    embedder = "time_embed"
    block_lists = {
        "transformer_blocks": BlockContract(
            returns=(HIDDEN,),
            tables=("image_rotary_emb", Table("attention_mask", axis=3)),
            attention=("attn",),
        )
    }
    noise = FlowSigma(given="sigma")

    @classmethod
    def latent_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """All: text joins them behind."""

    @classmethod
    def image_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> range:
        """Those behind the text, none of xfuser's padding."""
        layout = cls.forward_layout()
        text = layout.argument(ENCODER, args, kwargs).shape[1]  # of both branches, padded alike
        return range(text, text + layout.given(args, kwargs).sizes[0])

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, scaled and shifted by the timestep."""
        contract = cls.first_contract(block)
        x, temb = (contract.argument(name, args, kwargs) for name in (HIDDEN, "temb"))
        scale, shift = (temb.unflatten(-1, (6, -1)) + block.scale_shift_table).unbind(-2)[:2]
        return (1.0 + scale) * block.norm1(x) + shift

"""Qwen-Image and Qwen-Image-Edit: double-stream blocks, which carry image and text."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract, Table
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import HIDDEN


class QwenImageAdapter(ModelAdapter):
    """Qwen-Image as diffusers' `QwenImageTransformer2DModel` and as xfuser's subclass of it.

    Edit is this model too: behind the noise stand the tokens of the pictures that it edits. Since
    its version of November 2025 they have a timestep of their own, 0, by an index a token.

    Source: diffusers `models/transformers/transformer_qwenimage.py`, `pipelines/qwenimage`.
    """

    model_class = "QwenImageTransformer2DModel"
    embedder = "time_text_embed"
    block_lists = {
        "transformer_blocks": BlockContract(
            tables=(
                Table("image_rotary_emb", part=0),
                Table("modulate_index", axis=1, attended=False),
                # A mask of text and image, in diffusers 0.37 and in xfuser.
                Table("joint_attention_kwargs", axis=1, dims=2),
            ),
            attention=("attn",),
        )
    }
    noise = FlowSigma(given="sigma")

    @classmethod
    def noise_channels(cls, model: Any) -> int:
        """Those of a token: of a patch of pixels."""
        return model.config.in_channels

    @classmethod
    def image_tokens(
        cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> range | None:
        """Those of the first shape; of all but the last with layers (Qwen-Image-Layered)."""
        shapes = cls.forward_layout().argument("img_shapes", args, kwargs)
        if not shapes or len(shapes[0]) == 1:
            return None
        pictures = len(shapes[0]) - 1 if model.config.get("use_layer3d_rope") else 1
        return range(sum(map(prod, shapes[0][:pictures])))

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, shifted and scaled by the timestep of each token."""
        contract = cls.first_contract(block)
        x, temb, index = (
            contract.argument(name, args, kwargs) for name in (HIDDEN, "temb", "modulate_index")
        )
        modulation = block.img_mod(temb).chunk(2, dim=-1)[0]
        return block._modulate(block.img_norm1(x), modulation, index)[0]

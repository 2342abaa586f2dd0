"""HunyuanVideo 1.0: double-stream blocks, then single-stream ones; both carry video and text."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract, Table
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import HIDDEN

# In diffusers alone: xfuser's transformer leaves padded text out instead.
_MASK = Table("attention_mask", axis=3, text="behind")


class HunyuanVideoAdapter(ModelAdapter):
    """HunyuanVideo as diffusers' `HunyuanVideoTransformer3DModel` and as xfuser's subclass of it.

    Of image to video, one version has the picture in more channels behind the noise, the other one
    in the tokens of the first frame.

    Source: diffusers `models/transformers/transformer_hunyuan_video.py`, `pipelines/hunyuan_video`.
    """

    model_class = "HunyuanVideoTransformer3DModel"
    embedder = "time_text_embed"
    block_lists = {
        "transformer_blocks": BlockContract(tables=("freqs_cis", _MASK), attention=("attn",)),
        "single_transformer_blocks": BlockContract(
            tables=("image_rotary_emb", _MASK), attention=("attn",)
        ),
    }
    noise = FlowSigma(given="timestep")
    # TeaCache's code for HunyuanVideo (TeaCache4HunyuanVideo), of text to video.
    tea_polynomial = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)
    forecaster = "output"

    @classmethod
    def image_tokens(
        cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> range | None:
        """All but the first frame's where a picture takes their place."""
        config = model.config
        if config.image_condition_type != "token_replace":
            return None
        sizes = cls.forward_layout().given(args, kwargs).sizes[1:]
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        frames, *frame = (size // of for size, of in zip(sizes, patch, strict=True))
        return range(prod(frame), frames * prod(frame))

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm; tokens of a picture are modulated by a timestep of their own."""
        contract = cls.first_contract(block)
        if "token_replace_emb" not in contract.parameters:
            return super().modulated_input(block, args, kwargs)
        names = (HIDDEN, "temb", "token_replace_emb", "num_tokens")
        return block.norm1(*(contract.argument(name, args, kwargs) for name in names))[0]

    @classmethod
    def tea_polynomial_of(cls, model: Any) -> tuple[float, ...] | None:
        """That of text to video alone."""
        return None if model.config.image_condition_type else cls.tea_polynomial

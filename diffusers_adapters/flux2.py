"""FLUX.2: double-stream blocks, then single-stream blocks over text and image in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import ENCODER, HIDDEN
from xfuser_fastcache.models.token_layout import TokenLayout, leading_zeros

_BLOCK: dict[str, Any] = {"tables": ("image_rotary_emb",), "attention": ("attn",)}
# xfuser says how many tokens are text to stages that hold single-stream blocks alone.
_JOINED = TokenLayout(joined="text", text_tokens=("joint_attention_kwargs", "num_txt_tokens"))


class Flux2Adapter(ModelAdapter):
    """FLUX.2 dev and klein as diffusers' `Flux2Transformer2DModel` and both of xfuser's classes.

    Tokens of pictures to edit stand behind the noise, which the position ids tell; the pipeline
    that keeps their keys and values (klein KV) puts them in front, at the first step alone.

    Source: diffusers `models/transformers/transformer_flux2.py`, `pipelines/flux2`.
    """

    model_class = "Flux2Transformer2DModel"
    embedder = "time_guidance_embed"
    # What they return is stated: the registry of diffusers 0.37 does not know them.
    block_lists = {
        "transformer_blocks": BlockContract(returns=(ENCODER, HIDDEN), **_BLOCK),
        "single_transformer_blocks": BlockContract(returns=(HIDDEN,), layout=_JOINED, **_BLOCK),
    }
    noise = FlowSigma(given="sigma")

    @classmethod
    def image_tokens(
        cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> range | None:
        """Those before the first whose id has another first coordinate than 0."""
        layout = cls.forward_layout()
        if ahead := layout.argument("num_ref_tokens", args, kwargs):
            return range(ahead, layout.given(args, kwargs).sizes[0])
        count = leading_zeros(layout.argument("img_ids", args, kwargs))
        return None if count is None else range(count)

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The first block's norm, shifted and scaled by what is the same for all such blocks."""
        contract = cls.first_contract(block)
        modulation = contract.argument("temb_mod_img", args, kwargs)
        shift, scale = modulation.view(len(modulation), -1, modulation.shape[-1]).chunk(6, -1)[:2]
        return block.norm1(contract.argument(HIDDEN, args, kwargs)) * (1 + scale) + shift

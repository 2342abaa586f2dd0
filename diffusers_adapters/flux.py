"""FLUX.1: double-stream blocks, then single-stream blocks; both carry image and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.token_layout import leading_zeros

_BLOCK = BlockContract(tables=("image_rotary_emb",), attention=("attn",))


class FluxAdapter(ModelAdapter):
    """FLUX.1 as diffusers' `FluxTransformer2DModel` and as both of xfuser's wrappers around it.

    FLUX.1-Kontext is this model too: behind the noise stand the tokens of the picture that it
    edits, which the position ids tell. Fill and Control give it the condition in more channels.

    Source: diffusers `models/transformers/transformer_flux.py`, `pipelines/flux`.
    """

    model_class = "FluxTransformer2DModel"
    embedder = "time_text_embed"
    block_lists = {"transformer_blocks": _BLOCK, "single_transformer_blocks": _BLOCK}
    noise = FlowSigma(given="sigma")
    # TeaCache's code for FLUX.1-dev; xDiT's teacache takes the same.
    tea_polynomial = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)

    @classmethod
    def image_tokens(
        cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> range | None:
        """Those before the first whose id has another first coordinate than 0."""
        ids = cls.forward_layout().argument("img_ids", args, kwargs)
        count = None if ids is None else leading_zeros(ids)
        return None if count is None else range(count)

"""Lumina-Image 2.0: single-stream blocks over text and image as one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import HIDDEN
from xfuser_fastcache.models.token_layout import shared_rows


class Lumina2Adapter(ModelAdapter):
    """Lumina-Image 2.0 as diffusers' `Lumina2Transformer2DModel` and as xfuser's wrapper around it.

    Each item's image stands right behind its text, and texts differ in length. The rows that are
    image in every item are measured; the few others go with them, as a condition's would. The
    refiners ahead of `layers` run at every step; the output forecast skips them. Attention is
    given its tokens twice, as queries and as keys, so that token plans cannot leave some out.

    Source: diffusers `models/transformers/transformer_lumina2.py`, `pipelines/lumina2`.
    """

    model_class = "Lumina2Transformer2DModel"
    embedder = "time_caption_embed.timestep_embedder"
    block_lists = {"layers": BlockContract(returns=(HIDDEN,))}
    narrows = False
    noise = FlowSigma(given="time")
    counts_each_pass = True
    branches_apart = True  # one of them ends early

    @classmethod
    def dim(cls, model: Any) -> int:
        """Return the width of a token, which the model's config has by another name."""
        return model.config.hidden_size

    @classmethod
    def image_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> range:
        """Those that are image in every item: from the longest text to the end of the first."""
        layout = cls.forward_layout()
        mask = layout.argument("encoder_attention_mask", args, kwargs)
        pixels = prod(layout.given(args, kwargs).sizes[1:])
        return shared_rows(mask, pixels // model.config.patch_size**2)

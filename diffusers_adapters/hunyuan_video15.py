"""HunyuanVideo-1.5: joint blocks that carry video and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import ENCODER, HIDDEN


class HunyuanVideo15Adapter(ModelAdapter):
    """HunyuanVideo-1.5 as diffusers' transformer of that name and as xfuser's subclass of it.

    Of 65 channels the first 32 are noise, also in text to video. The mask is the text's alone.

    Source: diffusers `models/transformers/transformer_hunyuan_video15.py`, since 0.36.
    """

    model_class = "HunyuanVideo15Transformer3DModel"
    embedder = "time_embed"
    block_lists = {
        "transformer_blocks": BlockContract(
            returns=(HIDDEN, ENCODER), tables=("freqs_cis",), attention=("attn",)
        )
    }
    noise = FlowSigma(given="timestep")
    forecaster = "output"

    @classmethod
    def image_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> range:
        """All but the padding of xfuser's, where they do not divide by the ranks."""
        frames, height, width = cls.forward_layout().given(args, kwargs).sizes[1:]
        config = model.config
        side = config.patch_size
        return range(frames // config.patch_size_t * (height // side) * (width // side))

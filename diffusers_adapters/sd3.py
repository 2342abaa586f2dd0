"""Stable Diffusion 3 and 3.5: joint blocks that carry image and text; the last one drops text."""

from __future__ import annotations

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.noise import FlowSigma


class SD3Adapter(ModelAdapter):
    """SD3 as diffusers' `SD3Transformer2DModel` and as xfuser's wrapper around it.

    The last block is `context_pre_only` and returns None for the text, which the engine leaves
    out of anchors and forecasts; blocks with dual attention (SD3.5) are called alike.

    Source: diffusers `models/transformers/transformer_sd3.py`, `models/attention.py`.
    """

    model_class = "SD3Transformer2DModel"
    embedder = "time_text_embed"
    block_lists = {"transformer_blocks": BlockContract(attention=("attn", "attn2"))}
    noise = FlowSigma(given="timestep")

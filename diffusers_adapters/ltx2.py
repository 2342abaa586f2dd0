"""LTX-2: blocks that carry video and audio, each with text by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.modulation import by_own_table
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import ENCODER, HIDDEN
from xfuser_fastcache.models.token_layout import noisiest_rows


class LTX2Adapter(ModelAdapter):
    """LTX-2 as diffusers' `LTX2VideoTransformer3DModel` and as xfuser's subclass of it.

    Decisions rest on the video; the audio goes with it, forecast alike. The second stage is another
    generation, of three steps of the same transformer: nothing is skipped in it.

    Source: diffusers `models/transformers/transformer_ltx2.py`, `pipelines/ltx2`.
    """

    model_class = "LTX2VideoTransformer3DModel"
    embedder = "time_embed"
    block_lists = {
        "transformer_blocks": BlockContract(
            returns=(HIDDEN, ENCODER), encoder="audio_hidden_states"
        )
    }
    narrows = False
    noise = FlowSigma(given="timestep")
    forecaster = "output"

    @classmethod
    def image_tokens(
        cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> range | None:
        """Those of noise, where a picture to begin with stands among them."""
        layout = cls.forward_layout()
        tokens = layout.given(args, kwargs).sizes[0]
        return noisiest_rows(layout.argument(layout.timestep, args, kwargs), tokens)

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm of the video, shifted and scaled by its table and the timestep."""
        contract = cls.first_contract(block)
        x, temb = (contract.argument(name, args, kwargs) for name in (HIDDEN, "temb"))
        return by_own_table(block, x, temb)

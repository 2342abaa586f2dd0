"""Wan 2.1 and 2.2: blocks that carry video tokens alone; text and image by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract, Table
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import HIDDEN


class WanAdapter(ModelAdapter):
    """Wan as diffusers' `WanTransformer3DModel` and as xfuser's subclass of it.

    A picture to begin with stands in more channels behind the noise (2.1 and 2.2 I2V), or in the
    tokens of the first frame (2.2 TI2V), whose timestep is 0 then. xfuser pads tokens that do not
    divide by the ranks. Of 2.2 A14B, each of the two denoisers is such a model.

    Source: diffusers `models/transformers/transformer_wan.py`, `pipelines/wan`.
    """

    model_class = "WanTransformer3DModel"
    embedder = "condition_embedder"
    block_lists = {
        "blocks": BlockContract(
            tables=(Table("rotary_emb", axis=1), Table("temb", axis=1, dims=4, attended=False)),
            attention=("attn1",),
        )
    }
    noise = FlowSigma(given="timestep")
    # Of 720p x 81 frames, the tokens of a 14B model take 80 times as much memory as the latents.
    forecaster = "output"

    @classmethod
    def image_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> range:
        """Those from the first of the noisiest on; none of the padding."""
        layout = cls.forward_layout()
        sizes = layout.given(args, kwargs).sizes[1:]
        tokens = prod(n // of for n, of in zip(sizes, model.config.patch_size, strict=True))
        timestep = layout.argument(layout.timestep, args, kwargs)
        if timestep.dim() < 2:
            return range(tokens)
        noisiest = timestep[0] == timestep[0].amax()
        return range(int(noisiest.int().argmax()), tokens)

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, shifted and scaled by its own table and the timestep's."""
        contract = cls.first_contract(block)
        x, temb = (contract.argument(name, args, kwargs) for name in (HIDDEN, "temb"))
        # A timestep a token makes `(batch, tokens, 6, dim)`, else it is `(batch, 6, dim)`.
        shift, scale = (block.scale_shift_table + temb.float())[..., :2, :].unbind(-2)
        if temb.dim() == 3:
            shift, scale = shift[:, None], scale[:, None]
        return (block.norm1(x.float()) * (1 + scale) + shift).type_as(x)


class WanVACEAdapter(WanAdapter):
    """Wan 2.1 VACE: its blocks are Wan's, and some are followed by a hint from blocks of its own.

    Those run before all others, on what is given alone. Where blocks are skipped they run all the
    same; the output forecast skips them too.

    Source: diffusers `models/transformers/transformer_wan_vace.py`.
    """

    model_class = "WanVACETransformer3DModel"

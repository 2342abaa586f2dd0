"""Wan 2.1 and 2.2: blocks that carry video tokens alone; text and image by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract, Table
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.token_layout import noisiest_rows

# TeaCache's code for Wan 2.1 T2V (TeaCache4Wan2.1, `use_ret_steps`), by the width of the 1.3B model
# and of the 14B one; LightX2V's files for TeaCache have the same, first of two.
_TEA_T2V = {
    1536: (-5.21862437e4, 9.23041404e3, -5.28275948e2, 13.6987616, -4.99875664e-2),
    5120: (-3.03318725e5, 4.90537029e4, -2.65530556e3, 58.7365115, -0.315583525),
}


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
        return noisiest_rows(timestep, tokens) or range(tokens)

    @classmethod
    def tea_input(
        cls, contract: BlockContract, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The timestep's projection, `(batch, 6, dim)`: of Wan, TeaCache measures nothing else.

        So it decides alike for all videos of a schedule. With a timestep a token it is that of the
        first token of noise, in `(batch, 1, 6 dim)`.
        """
        temb = contract.argument("temb", args, kwargs)
        return temb if temb.dim() == 3 else contract.image_of(temb.flatten(2))[:, :1]

    @classmethod
    def tea_polynomial_of(cls, model: Any) -> tuple[float, ...] | None:
        """That of 2.1 T2V by its width; those for I2V go by the size of the video."""
        config = model.config
        width = config.num_attention_heads * config.attention_head_dim
        return None if config.in_channels > config.out_channels else _TEA_T2V.get(width)


class WanVACEAdapter(WanAdapter):
    """Wan 2.1 VACE: its blocks are Wan's, and some are followed by a hint from blocks of its own.

    Those run before all others, on what is given alone. Where blocks are skipped they run all the
    same; the output forecast skips them too.

    Source: diffusers `models/transformers/transformer_wan_vace.py`.
    """

    model_class = "WanVACETransformer3DModel"

"""Z-Image and Z-Image-Turbo: single-stream blocks over image and text as one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract, Table
from xfuser_fastcache.models.forward_layout import ForwardLayout
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import HIDDEN
from xfuser_fastcache.models.token_layout import TokenLayout


class ZImageAdapter(ModelAdapter):
    """Z-Image as diffusers' `ZImageTransformer2DModel` and as xfuser's subclass of it.

    Image and text are padded to multiples of 32 tokens, and stand in one tensor, the image first.
    The refiners ahead of `layers` run at every step, a few blocks; the output forecast skips them.

    Source: diffusers `models/transformers/transformer_z_image.py`, `pipelines/z_image`.
    """

    model_class = "ZImageTransformer2DModel"
    embedder = "t_embedder"
    block_lists = {
        "layers": BlockContract(
            hidden="x",
            tables=(Table("attn_mask", axis=1), Table("freqs_cis", axis=1)),
            attention=("attention",),
            layout=TokenLayout(joined="image"),
        )
    }
    forward = ForwardLayout(latents="x", timestep="t", lists=True)
    noise = FlowSigma(given="time")

    @classmethod
    def dim(cls, model: Any) -> int:
        """Return the width of a token, which the model's config has by another name."""
        return model.config.dim

    @classmethod
    def image_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> range:
        """Those from the first on, none of the padding."""
        layout = cls.forward_layout()
        frames, height, width = layout.given(args, kwargs).sizes[1:]
        patch, of_frames = (
            layout.argument(name, args, kwargs) or default
            for name, default in (("patch_size", 2), ("f_patch_size", 1))
        )
        return range(prod((frames // of_frames, height // patch, width // patch)))

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, scaled by the timestep."""
        contract = cls.first_contract(block)
        x, given = (contract.argument(name, args, kwargs) for name in (HIDDEN, "adaln_input"))
        scale = block.adaLN_modulation(given).unsqueeze(1).chunk(4, dim=2)[0]
        return block.attention_norm1(x) * (1.0 + scale)

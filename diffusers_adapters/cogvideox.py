"""CogVideoX: joint blocks that carry video and text, over a schedule of alphas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import ForwardLayout
from xfuser_fastcache.models.noise import NoiseAngle
from xfuser_fastcache.models.streams import ENCODER, HIDDEN

# TeaCache's code for CogVideoX and CogVideoX1.5 (TeaCache4CogVideoX1.5), by the model's width, its
# patches of frames, and whether it is given a picture.
_TEA_5B = (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339)
_TEA = {
    (1920, None, False): (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    (3072, None, False): _TEA_5B,
    (3072, None, True): _TEA_5B,
    (3072, 2, False): (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
    (3072, 2, True): (122.842302, -104.088754, 26.2981677, -0.306009921, 0.037121322),
}


class CogVideoXAdapter(ModelAdapter):
    """CogVideoX as diffusers' `CogVideoXTransformer3DModel` and as xfuser's wrapper around it.

    Frames come before channels. Of image to video, the picture stands in channels behind the noise.

    Source: diffusers `models/transformers/cogvideox_transformer_3d.py`, `pipelines/cogvideo`.
    """

    model_class = "CogVideoXTransformer3DModel"
    embedder = "time_embedding"
    block_lists = {
        "transformer_blocks": BlockContract(tables=("image_rotary_emb",), attention=("attn1",))
    }
    forward = ForwardLayout(channel_axis=2)
    noise = NoiseAngle(betas=(0.00085, 0.012), spacing="scaled_linear")
    forecaster = "output"

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The block's first norm, which takes the text as well."""
        contract = cls.first_contract(block)
        names = (HIDDEN, ENCODER, "temb")
        return block.norm1(*(contract.argument(name, args, kwargs) for name in names))[0]

    @classmethod
    def tea_input(
        cls, contract: BlockContract, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The timestep's embedding, `(batch, 1, dim)`: of CogVideoX, TeaCache measures no more."""
        return contract.argument("temb", args, kwargs)[:, None]

    @classmethod
    def tea_polynomial_of(cls, model: Any) -> tuple[float, ...] | None:
        """That of the model's size and version."""
        config = model.config
        given = config.in_channels > config.out_channels
        frames = getattr(config, "patch_size_t", None)
        return _TEA.get((cls.dim(model), frames, given))

"""FLUX.1: double-stream blocks, then single-stream blocks; both carry image and text."""

from __future__ import annotations

from typing import Any

from xfuser_fastcache.models.adapter import ModelAdapter, Step
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.streams import ENCODER, HIDDEN

# Since diffusers 0.35 both kinds of block take the two streams and return them text first.
_BLOCK = BlockContract(
    parameters=(HIDDEN, ENCODER, "temb", "image_rotary_emb", "joint_attention_kwargs"),
    returns=(ENCODER, HIDDEN),
    tables=("image_rotary_emb",),
    attention=("attn",),
)


class FluxAdapter(ModelAdapter):
    """FLUX.1 as diffusers' `FluxTransformer2DModel` and as xfuser's wrapper around it.

    Source: diffusers `models/transformers/transformer_flux.py`.
    """

    model_class = "FluxTransformer2DModel"
    timestep_index = 3
    embedder = "time_text_embed"
    block_lists = {"transformer_blocks": _BLOCK, "single_transformer_blocks": _BLOCK}
    # TeaCache's code for FLUX.1-dev; xDiT's teacache takes the same.
    tea_polynomial = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)

    @classmethod
    def noise_level(cls, timestep: float) -> float:
        """FLUX is given sigma itself (0 to 1)."""
        return timestep

    @classmethod
    def plan(cls, scheduler: Any) -> list[Step]:
        """Every planned step; the scheduler appends a final sigma of 0, which is no step."""
        count = len(scheduler.timesteps)
        return [Step(sigma, sigma) for sigma in scheduler.sigmas[:count].tolist()]

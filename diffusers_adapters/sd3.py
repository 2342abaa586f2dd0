"""Stable Diffusion 3 and 3.5: joint blocks that carry image and text; the last one drops text."""

from __future__ import annotations

from typing import Any

from xfuser_fastcache.models.adapter import ModelAdapter, Step
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.streams import ENCODER, HIDDEN

_BLOCK = BlockContract(
    parameters=(HIDDEN, ENCODER, "temb", "joint_attention_kwargs"),
    returns=(ENCODER, HIDDEN),
    attention=("attn", "attn2"),
)
_TRAIN_TIMESTEPS = 1000


class SD3Adapter(ModelAdapter):
    """SD3 as diffusers' `SD3Transformer2DModel` and as xfuser's wrapper around it.

    The last block is `context_pre_only` and returns None for the text, which the engine leaves
    out of anchors and forecasts; blocks with dual attention (SD3.5) are called alike.

    Source: diffusers `models/transformers/transformer_sd3.py`, `models/attention.py`.
    """

    model_class = "SD3Transformer2DModel"
    timestep_index = 3
    embedder = "time_text_embed"
    block_lists = {"transformer_blocks": _BLOCK}

    @classmethod
    def noise_level(cls, timestep: float) -> float:
        """Sigma (0 to 1)."""
        return timestep / _TRAIN_TIMESTEPS

    @classmethod
    def plan(cls, scheduler: Any) -> list[Step]:
        """Every planned step; the scheduler appends a final sigma of 0, which is no step."""
        count = len(scheduler.timesteps)
        sigmas = scheduler.sigmas[:count].tolist()
        return [Step(t, s) for t, s in zip(scheduler.timesteps.tolist(), sigmas, strict=True)]

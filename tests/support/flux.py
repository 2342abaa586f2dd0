"""A tiny FLUX in diffusers' pipeline that repeats its generation, cached or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline

from diffusers_adapters.tiny.flux import tiny_flux
from support.stack import EVER
from xfuser_fastcache import apply_cache_on_transformer
from xfuser_fastcache.engine import CacheEngine
from xfuser_fastcache.hooks import hook_on

STEPS = 8
# Two calls a step.
GUIDED: dict[str, Any] = {
    "true_cfg_scale": 2.0,
    "negative_prompt_embeds": torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32),
    "negative_pooled_prompt_embeds": torch.linspace(1, -1, 32)[None],
}


class Flux:
    """A tiny FLUX pipeline that repeats its generation."""

    def __init__(self, seed: int = 0, **sizes: int):
        self.pipe: FluxPipeline
        self.pipe, self.call = tiny_flux(seed, **sizes)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer

    def __call__(self, **changes: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        call = {**self.call, "num_inference_steps": STEPS, **changes, "generator": generator}
        return self.pipe(**call).images

    def cache(self, scheduler: bool = True, **options: Any) -> Flux:
        """Cache it; the pipeline's scheduler is given, or left to be found."""
        options = {"cache_ratio_threshold": EVER, **options}
        plan = self.pipe.scheduler if scheduler else None
        apply_cache_on_transformer(self.transformer, scheduler=plan, **options)
        return self

    def to(self, dtype: torch.dtype) -> Flux:
        """Turn weights and embeddings to a dtype."""
        self.pipe.to(dtype)
        self.call |= {k: v.to(dtype) for k, v in self.call.items() if k.endswith("embeds")}
        return self

    @property
    def engine(self) -> CacheEngine:
        """Of the cache."""
        return hook_on(self.transformer).engine

    @property
    def flags(self) -> list[int]:
        """What was decided in the last generation, as bits of spans."""
        return [flags for *_, flags in self.engine.decisions.entries]


def nan_after_step(step: int, mended: bool) -> Callable[..., dict[str, Any]]:
    """Return a callback that breaks the latents after `step` and may mend them a step later."""
    kept = {}

    def callback(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            kept["latents"] = given["latents"]
            return {"latents": torch.full_like(given["latents"], torch.nan)}
        return {"latents": kept["latents"]} if mended and index == step + 1 else {}

    return callback


def tiny_vae() -> AutoencoderKL:
    """A random VAE that makes 16 x 16 latents of 128 x 128 pixels."""
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    sizes: dict[str, Any] = {"block_out_channels": (4,) * 4, "norm_num_groups": 2}
    sizes |= {"latent_channels": 4, "layers_per_block": 1, "shift_factor": 0.0}
    return AutoencoderKL(down_block_types=down, up_block_types=up, **sizes)

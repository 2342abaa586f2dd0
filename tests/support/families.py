"""Tiny pipelines in plain diffusers, and what draws with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffusers_adapters.tiny import TINY_PIPELINES
from support.xdit_runs import latents_of


def made(name: str, steps: int, **sizes: Any) -> tuple[Any, Callable[..., torch.Tensor]]:
    """Return a tiny pipeline, and what draws with it in so many steps, with changed arguments."""
    pipe, call = TINY_PIPELINES[name](**sizes)
    return pipe, drawing(pipe, {**call, "num_inference_steps": steps})


def drawing(pipe: Any, call: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """Return what calls a pipeline with the noise of one seed, and returns the latents."""
    pipe.set_progress_bar_config(disable=True)

    def generate(**changed: Any) -> torch.Tensor:
        noise = torch.Generator().manual_seed(1)
        return latents_of(pipe(**{**call, "generator": noise, **changed}))

    return generate

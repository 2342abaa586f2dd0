"""What a tiny pipeline is: its maker, and what xDiT can do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

TEXT_TOKENS = 8


@dataclass(frozen=True)
class Limit:
    """What xDiT cannot do uncached with a pipeline, though with others of its family.

    Attributes:
        flag: of the layouts that are left out, whatever its value.
        reason: in a sentence.
        error: what xDiT itself says; None where it says nothing and draws something else.
    """

    flag: str
    reason: str
    error: str | None


@dataclass(frozen=True)
class TinyModel:
    """A tiny pipeline.

    Attributes:
        make: returns the pipeline and the arguments of one call; takes `batch`, and sizes.
        adapter: the registered one that it is for.
        of_runner: whether no pipeline class of xDiT's stands around it, or none but under
            PipeFusion: its runner runs it.
        models_a_step: how many there are that each run at every step, one for each branch.
        alone: whether one is drawn a call, so that there is no batch for replicas to share.
        limits: what xDiT cannot do with it.
        beyond: flags of what xDiT can do with it, though not with the first of its family.
    """

    make: Callable[..., tuple[Any, dict[str, Any]]]
    adapter: str
    of_runner: bool = False
    models_a_step: int = 1
    alone: bool = False
    limits: tuple[Limit, ...] = ()
    beyond: tuple[str, ...] = ()


def call_kwargs(batch: int, size: int) -> dict[str, Any]:
    generator = [torch.Generator("cpu").manual_seed(1000 + item) for item in range(batch)]
    return {
        "height": size,
        "width": size,
        "num_inference_steps": 3,
        "generator": generator,
        "output_type": "latent",
    }


def picture(size: int) -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((size, size))

"""What a family of models is to this benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GUIDANCE_SCALE = 4.5


@dataclass(frozen=True)
class Shape:
    """Sizes of one model and of what it is called with.

    Attributes:
        config: arguments of the diffusers transformer.
        latents: of one picture, without the batch.
        text_tokens: that a prompt is padded to.
        width: channels of a token between blocks.
        image_tokens: of one picture.
    """

    config: dict[str, Any]
    latents: tuple[int, ...]
    text_tokens: int
    width: int
    image_tokens: int


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        title: for people.
        model_class: name of the diffusers transformer.
        scheduler: makes the diffusers scheduler.
        plan: `(scheduler, steps, device, shape)` plans a generation, as the pipeline does.
        inputs: `(shape, draw)` makes what stays the same at all steps; `draw(*size)` is noise.
        call: `(model, latents, timestep, inputs)` returns the predicted noise.
        full: the real sizes.
        small: sizes for a rehearsal.
        batch: pictures that one call of the transformer carries, 2 with guidance.
        long: whether a generation takes so long that it gets half the steps, the middle mask
            alone, and one round.
        toy: arguments of a call of the embedded toy's pipeline at 128 px; None without a toy.
        toy_steps: computed steps of the mask in the toy's calibration.
    """

    title: str
    model_class: str
    scheduler: Callable[[], Any]
    plan: Callable[[Any, int, torch.device, Shape], None]
    inputs: Callable[[Shape, Callable[..., torch.Tensor]], dict[str, Any]]
    call: Callable[[Any, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
    full: Shape
    small: Shape
    batch: int = 1
    long: bool = False
    toy: dict[str, Any] | None = None
    toy_steps: int = 10


def guided(predicted: torch.Tensor) -> torch.Tensor:
    """Return the noise with guidance, of a call that carried both branches."""
    without, within = predicted.chunk(2)
    return without + GUIDANCE_SCALE * (within - without)


def two_calls(
    model: Any, predict: Callable[[torch.Tensor], torch.Tensor], text: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the noise with guidance, of a call for each branch, named as pipelines name them."""
    predicted = {}
    for branch in ("cond", "uncond"):
        with model.cache_context(branch):
            predicted[branch] = predict(text[branch])
    return predicted["uncond"] + GUIDANCE_SCALE * (predicted["cond"] - predicted["uncond"])


def plain_plan(scheduler: Any, steps: int, device: torch.device, shape: Shape) -> None:
    """Plan as pipelines do that give their scheduler the number of steps alone."""
    scheduler.set_timesteps(steps, device=device)

"""Plain denoising loops through a tiny FLUX, each branch with latents of its own.

They plan their steps with a scheduler and step by themselves, as loops of one's own may do: its
counter stands still, and the cache follows the plan by count.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from diffusers_adapters.tiny.flux import tiny_flux
from support.flux import STEPS
from support.stack import EVER
from xfuser_fastcache import apply_cache_on_transformer
from xfuser_fastcache.hooks import hook_on

LEVELS = [1 - step / STEPS for step in range(STEPS)]
SCHEDULER = FlowMatchEulerDiscreteScheduler()


class Branch:
    """One trajectory through the tiny FLUX; `moves` scales what a step changes of its latent.

    Ranks have latents of their own, as where tokens are shared out, and one text.
    """

    def __init__(self, seed: int, moves: float = 1.0, text_tokens: int = 8, rank: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.name = f"branch {seed}"
        self.noise = torch.randn(1, 16, 16, generator=generator)
        if rank:
            own = torch.Generator().manual_seed(seed + 10 * rank)
            self.noise = torch.randn(1, 16, 16, generator=own)
        self.text = torch.randn(1, text_tokens, 32, generator=generator)
        self.pooled = torch.randn(1, 32, generator=generator)
        self.moves = moves

    def start(self) -> None:
        self.latents, self.outputs = self.noise, []

    def step(self, transformer: nn.Module, level: float, named: bool) -> None:
        with transformer.cache_context(self.name) if named else nullcontext():
            output = transformer(
                hidden_states=self.latents,
                encoder_hidden_states=self.text,
                pooled_projections=self.pooled,
                timestep=torch.tensor([level]),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(self.text.shape[1], 3),
                return_dict=False,
            )[0]
        self.outputs.append(output)
        self.latents = self.latents - self.moves / STEPS * output


def begin(*branches: Branch, scheduler: Any = SCHEDULER) -> None:
    """Plan a generation, and take the branches' latents back to noise."""
    if scheduler is not None:
        scheduler.set_timesteps(sigmas=LEVELS)
    for branch in branches:
        branch.start()


def denoise(
    transformer: nn.Module,
    *branches: Branch,
    named: bool = False,
    left_out: dict[int, tuple[Branch, ...]] | None = None,
    scheduler: Any = SCHEDULER,
) -> list[list[torch.Tensor]]:
    """Call the transformer once a branch at each step; return the outputs of each branch.

    Args:
        transformer: the tiny FLUX.
        *branches: in the order of their calls.
        named: whether each call stands under `cache_context`.
        left_out: step -> branches that are not called at it.
        scheduler: plans the generation; None for a loop without any.
    """
    begin(*branches, scheduler=scheduler)
    for step, level in enumerate(LEVELS):
        for branch in branches:
            if branch not in (left_out or {}).get(step, ()):
                branch.step(transformer, level, named)
    return [branch.outputs for branch in branches]


def flags_of(transformer: nn.Module, branch: int = 0) -> dict[int, int]:
    """Return step -> flags of one branch of the last generation."""
    entries = hook_on(transformer).engine.decisions.entries
    return {step: flags for _, step, b, flags in entries if b == branch}


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Say whether tensors are equal one by one."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def alone(seed: int = 0, **options: Any) -> nn.Module:
    """Return a cached tiny FLUX that no pipeline holds."""
    pipe, _ = tiny_flux(seed)
    transformer, pipe.transformer = pipe.transformer, None
    return apply_cache_on_transformer(transformer, **{"cache_ratio_threshold": EVER, **options})


def cached(seed: int = 0, **options: Any) -> nn.Module:
    """Return one that goes by the plan of the loops' scheduler."""
    return alone(seed, **{"scheduler": SCHEDULER, **options})

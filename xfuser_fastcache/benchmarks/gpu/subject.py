"""One model with random weights and the loop that denoises with it, as its pipeline would."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from xfuser_fastcache.apply import apply_cache_on_transformer, remove_cache
from xfuser_fastcache.benchmarks.gpu.families import Family


def computed_mask(steps: int, skipped: float) -> list[int]:
    """Return a mask that skips about a share of the steps: ends computed, the rest evenly spaced.

    Args:
        steps: of a generation.
        skipped: share of them, 0 to 1.

    Example:
        >>> computed_mask(8, 0.5)
        [1, 0, 1, 0, 0, 1, 0, 1]
    """
    count = max(2, round(steps * (1 - skipped)))
    computed = {round(i * (steps - 1) / (count - 1)) for i in range(count)}
    return [int(step in computed) for step in range(steps)]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors are equal to the bit; a NaN equals itself."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


class Subject:
    """A transformer with random weights, on its device in bfloat16.

    Args:
        name: of the family.
        family: of models.
        device: where it runs.
        small: whether to take the rehearsal's sizes.
        steps: of a generation; half of them where that takes long.
    """

    def __init__(self, name: str, family: Family, device: torch.device, small: bool, steps: int):
        import diffusers

        self.name = name
        self.family = family
        self.shape = family.small if small else family.full
        self.device = device
        self.steps = steps // 2 if family.long and not small else steps
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                model = getattr(diffusers, family.model_class)(**self.shape.config)
        finally:
            torch.set_default_dtype(before)
        # Tables that come from numpy are elsewhere and in float32. Not the model's own `to`, which
        # warns of modules that are to stay in float32 although there are none.
        torch.nn.Module.to(model, device, torch.bfloat16)
        self.model: Any = model.eval().requires_grad_(False)
        self.generator = torch.Generator(device).manual_seed(0)
        for parameter in self.model.parameters():
            # Norms keep their ones.
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=self.generator)
        self.latents = self.draw(1, *self.shape.latents)
        self.inputs = family.inputs(self.shape, self.draw)
        self.scheduler = family.scheduler()

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def draw(self, *size: int) -> torch.Tensor:
        """Return noise on the device, in bfloat16."""
        return torch.randn(size, generator=self.generator, device=self.device, dtype=torch.bfloat16)

    def plan(self, steps: int | None = None) -> None:
        """Plan a generation; `denoise` does it too, unless it is told not to."""
        self.family.plan(self.scheduler, steps or self.steps, self.device, self.shape)

    def denoise(
        self,
        steps: int | None = None,
        planned: bool = False,
        each_step: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Run a generation from the same noise each time, and return its latents.

        Args:
            steps: number of steps, where it is another than usual.
            planned: whether `plan` was called for it already.
            each_step: is called with a step's index before it.
        """
        if not planned:
            self.plan(steps)
        latents = self.latents
        with torch.no_grad():
            for step, timestep in enumerate(self.scheduler.timesteps):
                if each_step is not None:
                    each_step(step)
                noise = self.family.call(self.model, latents, timestep, self.inputs)
                latents = self.scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return latents

    def timed(self, steps: int | None = None) -> tuple[float, torch.Tensor]:
        """Run a generation; return milliseconds a step of its loop, and its latents."""
        self.plan(steps)
        self.synchronize()
        started = time.perf_counter()
        latents = self.denoise(planned=True)
        self.synchronize()
        elapsed = time.perf_counter() - started
        return 1000 * elapsed / len(self.scheduler.timesteps), latents

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def cached(self, **options: Any) -> Iterator[None]:
        """Have the cache on the model, with `use_cache="Fast"` and these options."""
        apply_cache_on_transformer(
            self.model, scheduler=self.scheduler, use_cache="Fast", **options
        )
        try:
            yield
        finally:
            remove_cache(self.model)

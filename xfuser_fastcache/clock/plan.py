"""The steps that a scheduler has planned, and whether a timestep is one of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from xfuser_fastcache.models.noise import Step


class Timestep(NamedTuple):
    """A timestep as a transformer is given it.

    Attributes:
        value: rounded to the model's dtype, perhaps more than once.
        tolerance: largest relative error of that.
    """

    value: float
    tolerance: float

    @classmethod
    def of(cls, timestep: torch.Tensor) -> Timestep:
        """Read it from the device, which waits for that."""
        if not timestep.dtype.is_floating_point:
            return cls(float(timestep), 0.0)
        # Rounded once, scaled, and rounded once more: half of this each time.
        return cls(float(timestep), torch.finfo(timestep.dtype).eps)

    def is_rounded(self, planned: float) -> bool:
        """Say whether `planned` may have been rounded to this."""
        return abs(self.value - planned) <= self.tolerance * abs(planned) + 1e-7


@dataclass(frozen=True)
class Plan:
    """The steps that a scheduler has planned for the current generation.

    Attributes:
        timesteps: the scheduler's own tensor; `set_timesteps` makes a new one, so its identity
            marks a generation.
        steps: what it has planned, in order; one a call of a branch, of which Heun's method makes
            two a step.
    """

    timesteps: torch.Tensor
    steps: tuple[Step, ...]

    @cached_property
    def _words(self) -> str:
        # Rounded, since hosts need not agree in the last digits.
        levels = repr([f"{step.noise_level:.4g}" for step in self.steps])
        return f"{len(self.steps)} steps ({hashlib.sha256(levels.encode()).hexdigest()[:6]})"

    def __str__(self) -> str:
        return self._words

    def entry_of(self, timestep: Timestep) -> int | None:
        """Return the nearest entry that is rounded to a timestep, the first of equals; or None."""
        gaps = [abs(step.timestep - timestep.value) for step in self.steps]
        nearest = min(range(len(gaps)), key=gaps.__getitem__, default=0)
        return nearest if self.has(nearest, timestep) else None

    def has(self, index: int, timestep: Timestep) -> bool:
        """Say whether there is such an entry, and it is rounded to the timestep."""
        return 0 <= index < len(self.steps) and timestep.is_rounded(self.steps[index].timestep)

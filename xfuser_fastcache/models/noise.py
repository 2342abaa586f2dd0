"""Noise levels: the variable of forecasts, from a scheduler and from a timestep alone.

An adapter names one of these. `level` is for a timestep as the transformer is given it, where no
scheduler is at hand; `plan` is exact.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

# Timesteps of the schedules that all these families were trained with.
TRAIN_TIMESTEPS = 1000
# Below it rounding is all that would be brought up, of what is clean in a prediction.
SMALLEST_SHARE = 1e-3


@dataclass(frozen=True)
class Step:
    """One planned denoising step.

    Attributes:
        timestep: as the transformer gets it, but for rounding to the model's dtype.
        noise_level: the variable of forecasts: sigma, or what else grows evenly with the noise.
    """

    timestep: float
    noise_level: float


class Mixture(NamedTuple):
    """What latents and a prediction are made of, at a noise level.

    `latents = alpha * clean + sigma * noise`, and `prediction = of_clean * clean + of_noise *
    noise`.

    Example:
        >>> halfway = FlowSigma().mixture(0.5)
        >>> clean, noise = 3.0, 1.0
        >>> velocity = noise - clean
        >>> halfway.clean(0.5 * clean + 0.5 * noise, velocity)
        3.0
        >>> halfway.prediction(0.5 * clean + 0.5 * noise, 3.0) == velocity
        True
    """

    alpha: float
    sigma: float
    of_clean: float
    of_noise: float

    @property
    def tells(self) -> bool:
        """Whether latents and a prediction tell what is clean, and what is clean a prediction."""
        return abs(self._determinant) > SMALLEST_SHARE and self.sigma > 0

    @property
    def _determinant(self) -> float:
        return self.alpha * self.of_noise - self.sigma * self.of_clean

    def clean(self, latents: Any, prediction: Any) -> Any:
        """Return the clean latents, from noisy ones and a prediction."""
        return (self.of_noise * latents - self.sigma * prediction) / self._determinant

    def prediction(self, latents: Any, clean: Any) -> Any:
        """Return the prediction that would have been made, from noisy latents and clean ones."""
        of_latents = self.of_noise / self.sigma
        return of_latents * latents + (self.of_clean - of_latents * self.alpha) * clean


def velocity(level: float) -> Mixture:
    """Return that of flow matching: the prediction is noise less clean."""
    return Mixture(1.0 - level, level, -1.0, 1.0)


class NoiseLevels(ABC):
    """How a family's timesteps stand for noise."""

    @abstractmethod
    def level(self, timestep: float) -> float:
        """Return the noise level that belongs to a timestep as the transformer gets it."""

    @abstractmethod
    def plan(self, scheduler: Any) -> list[Step]:
        """Return the steps that `scheduler.timesteps` plans, in full precision."""

    @abstractmethod
    def mixture(self, level: float, predicts: str = "") -> Mixture:
        """Return what latents and the model's prediction are made of.

        Args:
            level: of noise.
            predicts: `prediction_type` of the scheduler's config; "" where it has none.
        """


@dataclass(frozen=True)
class FlowSigma(NoiseLevels):
    """Flow matching: sigma, from 1 (noise) to 0.

    Attributes:
        given: what the transformer is given: `"sigma"`; `"timestep"`, 1000 sigma (SD3, Wan); or
            `"time"`, which runs up, 1 - sigma (Z-Image).

    Example:
        >>> [FlowSigma(given).level(x) for given, x in (("timestep", 250.0), ("time", 0.75))]
        [0.25, 0.25]
    """

    given: Literal["sigma", "timestep", "time"] = "timestep"

    def level(self, timestep: float) -> float:
        """Return sigma."""
        if self.given == "timestep":
            return timestep / TRAIN_TIMESTEPS
        return timestep if self.given == "sigma" else 1.0 - timestep

    def plan(self, scheduler: Any) -> list[Step]:
        """Return every planned step; a scheduler appends a final sigma, which is no step."""
        count = len(scheduler.timesteps)
        sigmas = scheduler.sigmas[:count].tolist()
        if self.given == "sigma":
            return [Step(sigma, sigma) for sigma in sigmas]
        timesteps = scheduler.timesteps.tolist()
        if self.given == "time":
            timesteps = [1.0 - timestep / TRAIN_TIMESTEPS for timestep in timesteps]
        return [Step(t, sigma) for t, sigma in zip(timesteps, sigmas, strict=True)]

    def mixture(self, level: float, predicts: str = "") -> Mixture:
        """Return that of a velocity, noise less clean; the other way round where time runs up."""
        found = velocity(level)
        if self.given == "time":
            return found._replace(of_clean=1.0, of_noise=-1.0)
        return found


@dataclass(frozen=True)
class NoiseAngle(NoiseLevels):
    r"""Schedules of alphas: the angle :math:`\arctan\sqrt{(1 - a)/a}`, in radians.

    a is the cumulative product of alphas: a latent is the picture times the angle's cosine plus
    noise times its sine, so change grows with the angle alike at every step. Forecasts in it are 3
    to 5 dB better than in its tangent (docs/decisions/noise-angle.md). Where a schedule ends in
    noise alone (zero terminal SNR, a = 0) the angle is a right one; its tangent is not finite.

    Attributes:
        betas: first and last of those that the family was trained with.
        spacing: what rises evenly between them: `"linear"` betas, or `"scaled_linear"`, their
            square roots.

    Example:
        >>> round(NoiseAngle((0.0001, 0.02)).level(999), 2)
        1.56
    """

    betas: tuple[float, float]
    spacing: Literal["linear", "scaled_linear"] = "linear"

    def level(self, timestep: float) -> float:
        """Return the angle by the schedule of training."""
        return angle(_alphas_cumprod(self.betas, self.spacing), timestep)

    def plan(self, scheduler: Any) -> list[Step]:
        """Return every planned step with the angle by the scheduler's own schedule."""
        alphas = scheduler.alphas_cumprod.tolist()
        return [Step(t, angle(alphas, t)) for t in scheduler.timesteps.tolist()]

    def mixture(self, level: float, predicts: str = "") -> Mixture:
        """Return that of `epsilon`, `v_prediction` or `sample`; the first where nothing is said."""
        alpha, sigma = math.cos(level), math.sin(level)
        made = {"v_prediction": (-sigma, alpha), "sample": (1.0, 0.0)}
        return Mixture(alpha, sigma, *made.get(predicts, (0.0, 1.0)))


def angle(alphas_cumprod: Sequence[float], timestep: float) -> float:
    """Return the angle of a timestep, the nearest of the schedule; see `NoiseAngle`."""
    alpha = alphas_cumprod[min(max(round(timestep), 0), len(alphas_cumprod) - 1)]
    return math.atan(math.sqrt((1 - alpha) / alpha)) if alpha > 0 else math.pi / 2


@cache
def _alphas_cumprod(betas: tuple[float, float], spacing: str) -> list[float]:
    power = 1.0 if spacing == "linear" else 0.5
    first, last = (beta**power for beta in betas)
    rising = torch.linspace(first, last, TRAIN_TIMESTEPS, dtype=torch.float64) ** (1 / power)
    return torch.cumprod(1 - rising, dim=0).tolist()


def experts_of(timesteps: Sequence[float], boundary: float) -> list[int]:
    """Return which of two experts runs each step: 0 for much noise, 1 for little.

    Wan 2.2 has a denoiser for each; steps count through, and forecasts do not cross the boundary.

    Args:
        timesteps: of the scheduler.
        boundary: the ratio of 1000 down to which the first expert runs, `boundary_ratio` of the
            pipeline.

    Example:
        >>> experts_of([999.0, 900.0, 875.0, 600.0], boundary=0.875)
        [0, 0, 0, 1]
    """
    return [int(timestep < boundary * TRAIN_TIMESTEPS) for timestep in timesteps]

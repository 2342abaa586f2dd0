"""Spectrum: a ridge regression of the residual on Chebyshev polynomials of time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import chebyshev

from xfuser_fastcache.config.checks import integer, number, option
from xfuser_fastcache.forecasters.base import Forecaster, extrapolated, told_apart, weighted
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory

# Anchors that are remembered beyond what a regression must have.
SPARE = 5


@dataclass(frozen=True)
class SpectrumForecaster(Forecaster):
    r"""Chebyshev polynomials fitted to all that is remembered, blended with a local forecast.

    With :math:`\tau = 2\sigma/\sigma_{\max} - 1`, where :math:`\sigma_{\max}` is the highest noise
    level that is remembered, `X` the matrix of :math:`T_0(\tau_i), \dots, T_M(\tau_i)` and `R` the
    residuals,

    .. math::
        \hat r = w\, T(\tau)^\top (X^\top X + \lambda I)^{-1} X^\top R + (1 - w)\,[r_0 + (r_0 -
        r_1)(\sigma - \sigma_0)/(\sigma_0 - \sigma_1)]

    with `degree`, `ridge` and `share` as `M`, :math:`\lambda` and `w`. Exact on polynomials of
    sigma up to that degree as the ridge goes to 0, with `share` 1; with more of it all is shrunk,
    what is constant too. With fewer anchors than polynomials, or tokens that were computed at
    different steps, it is the local forecast, `taylor`.

    A fit is a weight an anchor, found on the host from noise levels alone. It remembers `degree` +
    6 computed steps, so its memory is 5 times that of `taylor`.

    Source: Spectrum, arXiv 2603.01623, and its code (github.com/hanjq17/Spectrum), whose settings
    for FLUX are these defaults. Deviations: time is the noise level where the code takes the index
    of the step over 50; its window of 100 steps, all there are, is bounded; before there are as
    many anchors as polynomials, which its warm-up of five steps sees to, nothing is fitted.
    """

    degree: int = option(4, integer(1, 16), "highest of the polynomials")
    ridge: float = option(0.1, number(0, ends=False), "weight of the coefficients' squares")
    share: float = option(0.5, number(0, 1), "of the regression beside the local forecast (ratio)")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "depth", self.degree + 1 + SPARE)

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the blended residual."""
        anchors = told_apart(memory)
        if len(anchors) <= self.degree:
            return inputs.map(torch.add, extrapolated(memory, noise_level))
        levels = np.array([noise_level, *(anchor.noise_level for anchor in anchors)])
        here, *known = chebyshev.chebvander(2 * levels / levels[1:].max() - 1, self.degree)
        design = np.stack(known)
        inverse = np.linalg.inv(design.T @ design + self.ridge * np.eye(self.degree + 1))
        weights = self.share * (here @ inverse @ design.T)
        local = (noise_level - levels[1]) / (levels[1] - levels[2])
        weights[:2] += (1 - self.share) * np.array([1 + local, -local])
        return inputs.map(torch.add, weighted(anchors, weights.tolist()))

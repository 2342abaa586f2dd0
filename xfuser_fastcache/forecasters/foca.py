"""FoCa: a forecast by backward differences, calibrated by the trapezoidal rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xfuser_fastcache.forecasters.base import (
    Forecaster,
    divided_difference,
    extrapolated,
    told_apart,
    weighted,
)
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory


@dataclass(frozen=True)
class FoCaForecaster(Forecaster):
    r"""BDF2 predictor and Heun corrector of the residual, over the last three computed steps.

    With `h` the distance ahead, :math:`\omega = h/(\sigma_0 - \sigma_1)` and :math:`g_0` the slope
    at the newest anchor by backward differences of three, the predictor is the two-step backward
    differentiation formula with the known slope in place of the unknown one,

    .. math:: p = \frac{(1+\omega)^2 r_0 - \omega^2 r_1 + (1+\omega)\,h\,g_0}{1+2\omega}

    which is :math:`(4 r_0 - r_1 + 2 h g_0)/3` an anchors' distance ahead, and the corrector
    :math:`\hat r = r_0 + \frac h2 (g_0 + g)`, where :math:`g = (p - r_0)/h` is the slope that was
    predicted. Exact where the residual is linear in sigma. With two anchors, two at one noise
    level, or tokens that were computed at different steps, it is `taylor`.

    Source: FoCa, arXiv 2508.16211, equations 6 to 8. Deviations: the formulas are those of uneven
    distances in the noise level, of which the paper's are the even case. The paper recurs over
    skipped steps; here each is forecast from the newest anchor in one stride, as a forecaster
    knows computed steps alone. The paper leaves open how the predicted slope is found; its
    equation 6 would return the slope that was put in. cache-dit's calibrator takes the difference
    of two computed steps for the slope a step, and bounds its reach by three steps.
    """

    depth = 3

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the calibrated residual."""
        anchors = told_apart(memory)
        levels = [anchor.noise_level for anchor in anchors]
        omega = 0.0
        if len(anchors) == 3:
            omega = (noise_level - levels[0]) / (levels[0] - levels[1])
        if omega <= 0:
            return inputs.map(torch.add, extrapolated(memory, noise_level))
        h = noise_level - levels[0]
        # All as weights: of the step h g0, and of the predicted change p - r0.
        chord = [*divided_difference(levels[:2], h), 0.0]
        bend = divided_difference(levels, h * (levels[0] - levels[1]))
        slope = [a + b for a, b in zip(chord, bend, strict=True)]
        ahead = [
            (omega * c + (1 + omega) * s) / (1 + 2 * omega)
            for c, s in zip(chord, slope, strict=True)
        ]
        weights = [(s + p) / 2 for s, p in zip(slope, ahead, strict=True)]
        weights[0] += 1
        return inputs.map(torch.add, weighted(anchors, weights))

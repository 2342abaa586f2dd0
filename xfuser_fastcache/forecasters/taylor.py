"""The residual, extrapolated in the noise level."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xfuser_fastcache.config.checks import number, option
from xfuser_fastcache.forecasters.base import (
    Forecaster,
    divided_difference,
    extrapolated,
    told_apart,
)
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory


@dataclass(frozen=True)
class TaylorForecaster(Forecaster):
    r"""First-order divided difference of the residual over the last two computed steps.

    :math:`\hat r(\sigma) = r_0 + (r_0 - r_1)(\sigma - \sigma_0)/(\sigma_0 - \sigma_1)`; exact
    where the residual is linear in sigma. With one anchor it is `reuse`.

    Source: TaylorSeer, arXiv 2503.06923, order 1. Deviation: differences over the noise level and
    not over the step index, since computed steps are unevenly spaced.
    """

    depth = 2

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the extrapolated residual."""
        return inputs.map(torch.add, extrapolated(memory, noise_level))


@dataclass(frozen=True)
class DampedTaylorForecaster(Forecaster):
    r"""First-order Taylor with a slope that fades: the further ahead, the less of it is believed.

    :math:`\hat r(\sigma) = r_0 + (r_0 - r_1)\,(1 - \varphi^w)/(-\ln \varphi)`, where
    :math:`w = (\sigma - \sigma_0)/(\sigma_0 - \sigma_1)` and `share` is :math:`\varphi`: near the
    anchor it is `taylor`'s forecast, far ahead it comes to rest at :math:`r_0 + (r_0 - r_1)/(-\ln
    \varphi)`. Exact where the residual is constant. With one anchor it is `reuse`.

    Source: TaylorSeer, arXiv 2503.06923, order 1, with the damped trend of Gardner and McKenzie,
    "Forecasting trends in time series", Management Science 31 (1985), in continuous time.
    Deviation: neither combines the two; see `TaylorForecaster` for the other.
    """

    depth = 2

    share: float = option(
        0.6,  # By measurement (docs/decisions/damped-taylor.md).
        number(0, 1, ends=False),
        "what is left of a slope an anchors' distance ahead (ratio)",
    )

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the extrapolated residual."""
        return inputs.map(torch.add, extrapolated(memory, noise_level, self.share))


@dataclass(frozen=True)
class SecondOrderTaylorForecaster(TaylorForecaster):
    r"""Second-order divided difference of the residual over the last three computed steps.

    :math:`\hat r(\sigma) = \hat r_1(\sigma) + r_{012} (\sigma - \sigma_0)(\sigma - \sigma_1)`, the
    first-order forecast and :math:`r_{012}` the second divided difference; exact where the residual
    is quadratic in sigma. With two anchors, two at one noise level, or tokens that were computed at
    different steps, it is of first order.

    Source: TaylorSeer, arXiv 2503.06923, order 2. Deviation as in first order.
    """

    depth = 3

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the extrapolated residual."""
        linear = super().forecast(memory, inputs, noise_level)
        anchors = told_apart(memory)
        if len(anchors) < 3:
            return linear
        levels = [anchor.noise_level for anchor in anchors]
        reach = (noise_level - levels[0]) * (noise_level - levels[1])
        weights = divided_difference(levels, reach)

        def bend(forecast: torch.Tensor, *residuals: torch.Tensor) -> torch.Tensor:
            curve = sum(w * r.float() for w, r in zip(weights, residuals, strict=True))
            return forecast + torch.as_tensor(curve).to(forecast.dtype)

        return linear.map(bend, *(anchor.residual for anchor in anchors))

"""A linear map, and what it leaves over extrapolated in the noise level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from xfuser_fastcache.forecasters.base import LinearMapForecaster, TaylorWeights, extrapolated
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory


@dataclass(frozen=True, eq=False)
class LinearTaylorForecaster(LinearMapForecaster):
    r"""A linear map of the input, with first-order Taylor on what it leaves over.

    With anchors 0 (newest) and 1, and :math:`w = (\sigma - \sigma_0)/(\sigma_0 - \sigma_1)`,

    .. math:: \hat r = r_0 + L(x - x_0) + w\,[(r_0 - r_1) - L(x_0 - x_1)]

    which, `L` being linear, is computed with one product in place of two as Taylor's forecast plus
    the map of what Taylor's forecast of the *input* is wrong by:

    .. math:: \hat r = r_0 + w (r_0 - r_1) + L[(x - x_0) - w (x_0 - x_1)]

    In this form the constant of a fitted map is fitted to what is left over, and enters once. `L`
    comes from calibration, fitted on the pairs that `pair` returns, so that it shrinks to `taylor`;
    without calibration it is the diagonal slope fitted between the two anchors (`online_slope`).
    With one anchor, or two at one noise level, `w` is 0 and the forecast is `linear`'s.

    Exact where the residual is `L x + c + d sigma` and `L` is the map, whatever the input does; and
    with any `L` where input and residual are linear in sigma.

    Source: FastCache, arXiv 2505.20353 (linear map), with TaylorSeer, arXiv 2503.06923, order 1.
    Deviation: neither combines the two; differences over the noise level and not over the step
    index, since computed steps are unevenly spaced.
    """

    depth = 2
    takes_maps = "linear_taylor"

    def surprise(
        self, memory: Memory, now: Streams, noise_level: float, of: Callable[[Anchor], Streams]
    ) -> Streams:
        """Return the difference from the linear extrapolation of the last two anchors."""
        newest, weights = of(memory.anchors[0]), TaylorWeights.of(memory, noise_level)
        moved = now.map(torch.sub, newest)
        if weights.are_zero:
            return moved
        # Of differences of neighbours, which are nearly exact in bf16; an extrapolated state would
        # be rounded at the state's own scale, which may be the scale of what is looked for.
        return weights.map(_less, moved, newest.map(torch.sub, of(memory.anchors[1])))

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the extrapolated and corrected residual."""
        expected = inputs.map(torch.add, extrapolated(memory, noise_level))
        return self.corrected(expected, memory, inputs, noise_level)


def _less(change: torch.Tensor, last: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    if isinstance(weight, float):
        return torch.sub(change, last, alpha=weight)
    return (change - weight * last.float()).to(change.dtype)

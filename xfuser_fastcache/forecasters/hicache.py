"""HiCache: Hermite polynomials in place of Taylor's powers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xfuser_fastcache.config.checks import integer, number, option
from xfuser_fastcache.forecasters.base import (
    Forecaster,
    TaylorWeights,
    divided_difference,
    extrapolated_by,
    told_apart,
    weighted,
)
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory


@dataclass(frozen=True)
class HiCacheForecaster(Forecaster):
    r"""Second-order forecast of the residual in scaled Hermite polynomials.

    :math:`\hat r(x) = r_0 + \sum_{k=1}^2 \frac{s^k}{k!} H_k(s x)\, \Delta^k`, with :math:`H_1(y) =
    2y` and :math:`H_2(y) = 4y^2 - 2` of the physicists, `x` in steps from the newest anchor,
    :math:`\Delta^k` the differences of that order a step, and `scale` as `s`. So :math:`2 s^2` of a
    slope is believed, at 0.5 a half. Exact where the residual is constant, and with a `scale` of
    :math:`\sqrt{1/2}` and two anchors where it is linear in sigma; not at the anchor itself, where
    :math:`-s^2 \Delta^2` is left over. With two anchors, or tokens that were computed at different
    steps, it is of first order; with one anchor it is `reuse`.

    Source: HiCache, arXiv 2508.16984, with both scalings as in its code for FLUX
    (github.com/yiming-l21/CFGCache), whose order and interval are these defaults. Deviations:
    differences are divided ones over the noise level, where the code divides those of every order
    by the last distance; and the length of a step is the distance of the last two anchors over
    `interval`, since noise levels alone do not tell how many steps lie between.
    """

    depth = 3

    scale: float = option(
        0.5, number(0, 1, ends=False), "of the argument and of each order (ratio)"
    )
    interval: int = option(5, integer(1), "steps that make up an anchors' distance")

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the forecast residual."""
        anchors = told_apart(memory)
        if len(anchors) < 3:
            slope = TaylorWeights.of(memory, noise_level).times(2 * self.scale**2)
            return inputs.map(torch.add, extrapolated_by(slope, memory))
        levels = [anchor.noise_level for anchor in anchors]
        step = (levels[0] - levels[1]) / self.interval
        y = self.scale * (noise_level - levels[0]) / step
        # A difference of order k a step is k! step^k times the divided one.
        rate = self.scale * step
        first = divided_difference(levels[:2], rate * 2 * y)
        second = divided_difference(levels, rate**2 * (4 * y * y - 2))
        weights = [1 + first[0] + second[0], first[1] + second[1], second[2]]
        return inputs.map(torch.add, weighted(anchors, weights))

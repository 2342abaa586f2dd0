"""Dynamic mode decomposition: the residual as a sum of two exponentials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from xfuser_fastcache.config.checks import integer, option
from xfuser_fastcache.forecasters.base import Forecaster, extrapolated, told_apart
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory

# Anchors that two poles need to be told from noise, as cache-dit has it.
FEWEST = 4
# Of the energy of what is fitted: below it a second pole is rounding. cache-dit drops singular
# values below 1e-4 of the largest.
RIDGE = 1e-8
# Gaps that differ in noise level by less than this factor count as even.
EVEN = 2.0
# Poles that are nearer to each other would cancel in double precision.
NEAREST = 1e-12


@dataclass(frozen=True)
class DMDForecaster(Forecaster):
    r"""Two modes that each grow, fade or turn by a factor a computed step.

    Over the last computed steps :math:`r_{j+1} \approx a\,r_j + b\,r_{j-1}` is fitted by least
    squares, for each item of the batch. The roots of :math:`\lambda^2 = a \lambda + b` are the
    poles, and with them both newest residuals are carried on by the fraction :math:`w = (\sigma -
    \sigma_0)/(\sigma_0 - \sigma_1)` of a computed step:

    .. math::
        \hat r = \frac{\lambda_1^{w+1} - \lambda_2^{w+1}}{\lambda_1 - \lambda_2}\, r_0 -
        \lambda_1 \lambda_2 \frac{\lambda_1^w - \lambda_2^w}{\lambda_1 - \lambda_2}\, r_1

    of which the real part is taken. Exact on sums of two exponentials (a constant is one) over
    evenly spaced steps. With fewer than four anchors whose gaps differ by less than a factor of
    two, or tokens that were computed at different steps, it is `taylor`; where the fit is not
    finite, `reuse`.

    Source: `DMDCalibrator` of cache-dit 1.5 (github.com/vipshop/cache-dit), after Schmid, "Dynamic
    mode decomposition of numerical and experimental data", Journal of Fluid Mechanics 656 (2010).
    Deviations: two poles, where cache-dit keeps as many as the snapshots have ranks: their roots
    are found on the device, where a decomposition would make the host wait. Steps are counted in
    computed ones, which cache-dit asks to be exactly evenly spaced. Ranks that share out tokens
    fit their own, as those of `linear`.
    """

    history: int = option(6, integer(FEWEST, 16), "computed steps that are fitted")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "depth", self.history)

    def update(self, memory: Memory, anchor: Anchor) -> Memory:
        """Remember the step and fit the recurrence to what is remembered."""
        updated = super().update(memory, anchor)
        anchors = _evenly_spaced(updated)
        if len(anchors) < FEWEST:
            return replace(updated, slope=None)
        newest, *others = (anchor.residual for anchor in anchors)
        return replace(updated, slope=newest.map(_recurrence, *others))

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the residual, carried on by its modes."""
        if memory.slope is None:
            return inputs.map(torch.add, extrapolated(memory, noise_level))
        newest, before = memory.anchors[:2]
        gap = newest.noise_level - before.noise_level
        fraction = (noise_level - newest.noise_level) / gap

        def carry(
            now: torch.Tensor, r0: torch.Tensor, r1: torch.Tensor, fitted: torch.Tensor
        ) -> torch.Tensor:
            a, b = _carried(fitted, fraction).to(torch.promote_types(r0.dtype, torch.float32))
            each = (-1, *(1,) * (r0.dim() - 1))
            return now + (a.view(each) * r0 + b.view(each) * r1).to(r0.dtype)

        return inputs.map(carry, newest.residual, before.residual, memory.slope)


def _evenly_spaced(memory: Memory) -> Sequence[Anchor]:
    """Return the newest anchors whose gaps count as even, newest first."""
    anchors = told_apart(memory)
    gaps = [newer.noise_level - older.noise_level for newer, older in pairwise(anchors)]
    for count, gap in enumerate(gaps):
        ratios = [gap / other for other in gaps[:count]]
        if not all(1 / EVEN < ratio < EVEN for ratio in ratios):
            return anchors[: count + 1]
    return anchors


def _recurrence(*residuals: torch.Tensor) -> torch.Tensor:
    """Return `a` and `b` of each item of the batch, `(2, batch)`, float64.

    Args:
        residuals: newest first, at least three.
    """

    def dot(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> torch.Tensor:
        wide = torch.promote_types(xs[0].dtype, torch.float32)
        products = ((x.to(wide) * y.to(wide)).flatten(1) for x, y in zip(xs, ys, strict=True))
        return torch.stack([each.sum(1, dtype=torch.float64) for each in products]).sum(0)

    ahead, here, behind = residuals[:-2], residuals[1:-1], residuals[2:]
    p, q, r = dot(here, here), dot(here, behind), dot(behind, behind)
    s, t = dot(ahead, here), dot(ahead, behind)
    ridge = RIDGE * (p + r)
    p, r = p + ridge, r + ridge
    return torch.stack((r * s - q * t, p * t - q * s)) / (p * r - q * q)


def _carried(fitted: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the weights of the newest two residuals, `(2, batch)`; of reuse where not finite."""
    a, b = fitted
    square = a * a / 4 + b
    square = torch.where(square.abs() < NEAREST, NEAREST, square).to(torch.complex128)
    one, other = a / 2 + square.sqrt(), a / 2 - square.sqrt()
    newest = (one ** (fraction + 1) - other ** (fraction + 1)) / (one - other)
    before = -one * other * (one**fraction - other**fraction) / (one - other)
    found = torch.stack((newest.real, before.real))
    reuse = torch.stack((torch.ones_like(a), torch.zeros_like(a)))
    return torch.where(found.isfinite().all(0), found, reuse)

"""Dynamic mode decomposition: the residual as a sum of exponentials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from xfuser_fastcache.config.checks import integer, option
from xfuser_fastcache.forecasters.base import Forecaster, extrapolated, told_apart
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory

# Anchors that even one oscillation needs, as cache-dit has it.
FEWEST = 4
# Of the energy of what is fitted: what is weaker is rounding. cache-dit drops singular values below
# 1e-4 of the largest.
RIDGE = 1e-8
# Gaps that differ in noise level by less than this factor count as even.
EVEN = 2.0
# Of the search for poles, which gains digits twice as fast from step to step where it is near.
ITERATIONS = 40


@dataclass(frozen=True)
class DMDForecaster(Forecaster):
    r"""Modes that each grow, fade or turn by a factor of their own a computed step.

    With :math:`r_1, \dots, r_n` the residuals of the last computed steps, oldest first, the newest
    one is fitted by the others, :math:`r_n \approx \sum_{j<n} c_j r_j`, for each item of the batch.
    The roots of :math:`\lambda^{n-1} = \sum_j c_j \lambda^{j-1}` are the factors, and a fraction
    :math:`w = (\sigma - \sigma_n)/(\sigma_n - \sigma_{n-1})` of a step on,

    .. math:: \hat r = \sum_{j<n} g_j r_{j+1} \quad\text{with}\quad
        \sum_j g_j \lambda_i^{j-1} = \lambda_i^{n-2+w} \text{ for each } i

    This is the decomposition in which no mode is dropped, written without the modes themselves.
    Exact on sums of n - 1 exponentials (a constant is one) over evenly spaced steps. With fewer
    than four anchors whose gaps differ by less than a factor of two, or tokens that were computed
    at different steps, it is `taylor`; where the fit is not finite, `reuse`.

    Source: `DMDCalibrator` of cache-dit 1.5 (github.com/vipshop/cache-dit), after Schmid, "Dynamic
    mode decomposition of numerical and experimental data", Journal of Fluid Mechanics 656 (2010).
    Deviations: a ridge in place of a bound on singular values, and roots that are searched on the
    device, so that the host waits for nothing. Steps are counted in computed ones, which cache-dit
    asks to be exactly evenly spaced. Ranks that share out tokens fit their own, as with `linear`.
    """

    history: int = option(6, integer(FEWEST, 12), "computed steps that are fitted")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "depth", self.history)

    def update(self, memory: Memory, anchor: Anchor) -> Memory:
        """Remember the step and find the factors by which what is remembered goes on."""
        updated = super().update(memory, anchor)
        anchors = _evenly_spaced(updated)
        if len(anchors) < FEWEST:
            return replace(updated, slope=None)
        newest, *others = (anchor.residual for anchor in anchors)
        return replace(updated, slope=newest.map(_factors, *others))

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the residual, carried on by its modes."""
        factors = memory.slope
        if factors is None:
            return inputs.map(torch.add, extrapolated(memory, noise_level))
        anchors = memory.anchors[: factors.hidden_states.shape[-1]]
        step = anchors[0].noise_level - anchors[1].noise_level
        fraction = (noise_level - anchors[0].noise_level) / step

        def carry(
            now: torch.Tensor, factors: torch.Tensor, *residuals: torch.Tensor
        ) -> torch.Tensor:
            wide = torch.promote_types(now.dtype, torch.float32)
            weights = _weights(factors, fraction).to(wide)
            each = weights.view(*weights.shape, *(1,) * (now.dim() - 1))
            moved = torch.zeros_like(now, dtype=wide)
            for weight, residual in zip(each, residuals, strict=True):
                moved.addcmul_(weight, residual.to(wide))
            return now + moved.to(now.dtype)

        return inputs.map(carry, factors, *(anchor.residual for anchor in anchors))


def _evenly_spaced(memory: Memory) -> Sequence[Anchor]:
    """Return the newest anchors whose gaps count as even, newest first."""
    anchors = told_apart(memory)
    gaps = [newer.noise_level - older.noise_level for newer, older in pairwise(anchors)]
    for count, gap in enumerate(gaps):
        ratios = [gap / other for other in gaps[:count]]
        if not all(1 / EVEN < ratio < EVEN for ratio in ratios):
            return anchors[: count + 1]
    return anchors


def _factors(*residuals: torch.Tensor) -> torch.Tensor:
    """Return the factors of each item's modes, `(batch, anchors - 1)`, complex128.

    Args:
        residuals: newest first.
    """
    wide = torch.promote_types(residuals[0].dtype, torch.float32)
    flat = [residual.flatten(1).to(wide) for residual in residuals]

    def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * y).sum(1, dtype=torch.float64)

    newest, *others = flat
    rows = [torch.stack([dot(x, y) for y in others], dim=-1) for x in others]
    gram = torch.stack(rows, dim=-1)
    right = torch.stack([dot(newest, y) for y in others], dim=-1)
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    gram.diagonal(dim1=-2, dim2=-1).add_(RIDGE * energy[:, None])
    # Coefficients, of the power one below the roots' number first.
    fitted, _ = torch.linalg.solve_ex(gram, right)
    return _roots(fitted)


def _roots(fitted: torch.Tensor) -> torch.Tensor:
    """Return the roots of monic polynomials, `(batch, n)`, all at once (Durand and Kerner).

    Args:
        fitted: what `x**n` equals, the coefficients of `x**(n - 1)` to 1, `(batch, n)`.
    """
    count = fitted.shape[-1]
    polynomial = torch.cat((-fitted.flip(-1), torch.ones_like(fitted[:, :1])), dim=-1)
    polynomial = polynomial.to(torch.complex128).unsqueeze(-1)
    # Powers are taken on the device: a tensor that is brought there makes the host wait.
    powers = torch.arange(count, device=fitted.device).to(torch.complex128)
    roots = torch.pow(0.4 + 0.9j, powers).expand(len(fitted), count)
    itself = torch.eye(count, dtype=torch.bool, device=fitted.device)
    for _ in range(ITERATIONS):
        values = (torch.linalg.vander(roots, N=count + 1) @ polynomial).squeeze(-1)
        apart = (roots.unsqueeze(-1) - roots.unsqueeze(-2)).masked_fill(itself, 1.0)
        roots = roots - values / apart.prod(-1)
    return roots


def _weights(factors: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the weights of residuals, newest first, `(n, batch)`; of reuse where not finite."""
    count = factors.shape[-1]
    powers = torch.linalg.vander(factors, N=count)
    found, _ = torch.linalg.solve_ex(powers, factors ** (count - 1) * factors**fraction)
    weights = found.real.flip(-1).T
    reuse = torch.zeros_like(weights)
    reuse[0] = 1.0
    return torch.where(weights.isfinite().all(0), weights, reuse)

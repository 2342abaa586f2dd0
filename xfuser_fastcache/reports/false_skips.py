"""What alpha bounds: harmful skips as a share of skips, over generations.

The *false-skip rate* is the mean over generations of harmful skips / skips, 0 where a generation
has none. Steps of one generation are correlated, so a generation is the unit of every mean and
interval. The maths is in `docs/methods/statistics.md`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Interval(NamedTuple):
    """A 95 % interval of a ratio."""

    low: float
    high: float


def harmful_share(harmful: ArrayLike, skips: ArrayLike) -> NDArray[np.float64]:
    """Return harmful skips / skips, 0 where nothing was skipped: what alpha bounds the mean of.

    Args:
        harmful: harmful skips, counts of any shape.
        skips: all skips, counts of the same shape.

    Raises:
        ValueError: shapes that differ, or a count that is negative or exceeds its skips.
    """
    part, whole = np.asarray(harmful, dtype=float), np.asarray(skips, dtype=float)
    if part.shape != whole.shape:
        raise ValueError(f"harmful {part.shape} and skips {whole.shape} must have one shape")
    if not np.all((part >= 0) & (part <= whole) & np.isfinite(whole)):
        raise ValueError("counts must be finite, with 0 <= harmful <= skips")
    return part / np.maximum(whole, 1)


def false_skip_rate(harmful: ArrayLike, skips: ArrayLike) -> float:
    """Return the mean over generations of harmful skips / skips, 0 where a generation has none.

    Args:
        harmful: `(generations,)`, harmful skips of each, counts.
        skips: `(generations,)`, all skips of each, counts.

    Raises:
        ValueError: no generation, or counts that `harmful_share` refuses.

    Example:
        >>> false_skip_rate(harmful=[1, 0, 0, 0], skips=[4, 10, 5, 0])
        0.0625
    """
    return float(_shares(harmful, skips).mean())


def false_skip_interval(harmful: ArrayLike, skips: ArrayLike, seed: int = 0) -> Interval | None:
    """Return a 95 % percentile bootstrap interval of the rate, resampling whole generations.

    Where no harmful skip was seen in n generations, resampling knows nothing but 0. The upper end
    is then 1 - 0.05 ** (1 / n), about 3 / n: were more generations than that to have a harmful
    skip, seeing none would have a probability below 5 %, and the rate is at most the share of such
    generations.

    Args:
        harmful: `(generations,)`, harmful skips of each, counts.
        skips: `(generations,)`, all skips of each, counts.
        seed: of the resampling.

    Returns:
        None for a single generation: it says nothing of how generations differ.

    Raises:
        ValueError: no generation, or counts that `harmful_share` refuses.

    Example:
        >>> [round(end, 4) for end in false_skip_interval(harmful=[0] * 64, skips=[10] * 64)]
        [0.0, 0.0457]

    Source: Efron, Tibshirani: An Introduction to the Bootstrap (1993), chapter 13; Hanley,
    Lippman-Hand: If Nothing Goes Wrong, Is Everything All Right? JAMA 249 (1983) 1743-1745.
    """
    from scipy.stats import bootstrap  # slow to import, and for audits alone

    shares = _shares(harmful, skips)
    if len(shares) == 1:
        return None
    if not shares.any():
        return Interval(0.0, 1 - 0.05 ** (1 / len(shares)))
    found = bootstrap(
        (shares,),
        np.mean,
        method="percentile",
        batch=500,  # 9999 resamples at once would take 80 kB a generation
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def _shares(harmful: ArrayLike, skips: ArrayLike) -> NDArray[np.float64]:
    """Return `harmful_share` of a row of at least one generation."""
    shares = harmful_share(harmful, skips)
    if shares.ndim != 1 or len(shares) == 0:
        raise ValueError(f"counts of shape {shares.shape} must be (generations,), at least one")
    return shares

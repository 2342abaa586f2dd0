"""The statistics of calibration: how thresholds keep alpha, and how many generations it takes.

What alpha bounds is defined in `false_skips.py`; the maths, with its assumptions, is in
`docs/methods/calibrated.md`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import chi2

# Room for the rounding of a sum of losses: far below what one harmful skip adds.
ROUNDING = 1e-12


def least_generations(alpha: float) -> int:
    """Return 1 / alpha, rounded up: fewer generations are refused by `conformal_scale`.

    With fewer than 1 / alpha - 1 the bound exceeds alpha even where no loss was seen.

    Args:
        alpha: a ratio between 0 and 1, exclusive.

    Raises:
        ValueError: alpha out of range.

    Example:
        >>> least_generations(0.05), least_generations(0.01)
        (20, 100)
    """
    return math.ceil((1 - ROUNDING) / _level(alpha))


def conformal_scale(losses: ArrayLike, scales: ArrayLike, alpha: float) -> float:
    r"""Choose the largest scale whose expected loss on a new generation is at most alpha.

    The largest :math:`\lambda` with :math:`\frac{n}{n+1} \bar L(\lambda) + \frac{1}{n+1} \le
    \alpha`, :math:`\bar L` being the mean over the n generations. The guarantee needs generations
    that are exchangeable with the new one, and losses that never fall as the scale grows; each
    generation's loss is therefore replaced by its running maximum, which can only choose lower.

    Args:
        losses: `(generations, scales)`, ratios in [0, 1]: the loss of each at each scale. The loss
            of scale 0 is taken to be 0 (nothing is skipped).
        scales: `(scales,)`, above 0 and ascending, fixed before the losses were seen.
        alpha: the expected loss allowed, a ratio between 0 and 1, exclusive.

    Returns:
        One of `scales`; 0.0 where none is allowed.

    Raises:
        ValueError: too few generations for alpha, wrong shapes, losses outside [0, 1], or scales
            that do not ascend.

    Example:
        >>> quiet, loud = [0.0, 0.0, 0.0], [0.0, 0.5, 1.0]
        >>> conformal_scale([quiet] * 18 + [loud] * 2, scales=[0.5, 1.0, 1.5], alpha=0.1)
        1.0

    Source: Angelopoulos, Bates, Fisch, Lei, Schuster: Conformal Risk Control, arXiv 2208.02814,
    section 2 (with losses bounded by 1, and a scale in place of the size of a set).
    """
    table, grid = np.asarray(losses, dtype=float), np.asarray(scales, dtype=float)
    if grid.ndim != 1 or grid.size == 0 or table.ndim != 2 or table.shape[1] != grid.size:
        raise ValueError(
            f"losses {table.shape} and scales {grid.shape} must have the shapes "
            "(generations, scales) and (scales,), with at least one scale"
        )
    if not (np.all(np.isfinite(grid)) and grid[0] > 0 and np.all(np.diff(grid) > 0)):
        raise ValueError("scales must be finite, above 0 and ascending: sort them, drop repeats")
    if not np.all((table >= 0) & (table <= 1)):  # also False for what is not a number
        raise ValueError("losses must lie in [0, 1]: give ratios, not counts")
    given, needed = len(table), least_generations(alpha)
    if given < needed:
        raise ValueError(
            f"{given} generations were given, alpha = {alpha} needs at least {needed}: "
            "record more of them or allow a larger alpha"
        )
    worst = np.maximum.accumulate(table, axis=1)
    allowed = worst.sum(axis=0) + 1 <= alpha * (given + 1) + ROUNDING
    # The running maximum makes the allowed scales a beginning of the grid.
    return float(grid[allowed][-1]) if allowed.any() else 0.0


def degrees_of_freedom(changes: ArrayLike) -> float:
    r"""Match the first two moments of a statistic with those of a scaled chi-square variable.

    :math:`\nu = 2 m^2 / s^2`, m the mean and :math:`s^2` the unbiased variance over generations.
    Whatever varies from generation to generation lowers it, and with it the lower quantile.

    Args:
        changes: `(generations,)`, at least two: Q (or Q / R) of each in one cell, not below 0.

    Returns:
        At least 1; `inf` where the statistic does not vary: `chi2_factor` of that is 1, so the
        test compares with no allowance for noise.

    Raises:
        ValueError: not a row of at least two finite numbers from 0 up.

    Example:
        >>> round(degrees_of_freedom([0.9, 1.0, 1.1]), 9)
        200.0

    Source: Satterthwaite, Biometrics Bulletin 2 (1946) 110-114, doi:10.2307/3002019.
    """
    values = np.asarray(changes, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"changes of shape {values.shape} must be (generations,), of at least 2 generations"
        )
    if not np.all(np.isfinite(values) & (values >= 0)):
        raise ValueError("changes must be finite and not negative: give sums of squares")
    if np.ptp(values) == 0:  # the variance itself would keep a trace of rounding
        return math.inf
    relative = values / values.mean()  # so that no unit overflows or underflows
    return max(float(2 / relative.var(ddof=1)), 1.0)


def chi2_factor(degrees: float, alpha: float) -> float:
    r"""Return the lower quantile :math:`\chi^2_{\nu,\alpha} / \nu`, a ratio; 1.0 for `inf`.

    Args:
        degrees: :math:`\nu`, above 0.
        alpha: a ratio between 0 and 1, exclusive.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> round(chi2_factor(10, 0.05), 4)
        0.394
    """
    level = _level(alpha)
    if not degrees > 0:
        raise ValueError(f"degrees = {degrees} must be above 0")
    return 1.0 if math.isinf(degrees) else float(chi2.ppf(level, degrees) / degrees)


def _level(alpha: float) -> float:
    """Return alpha, between 0 and 1."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha = {alpha} must lie between 0 and 1, exclusive")
    return alpha

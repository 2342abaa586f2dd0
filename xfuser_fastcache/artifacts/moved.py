"""A calibration's mask and corrections, moved to another plan of noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from xfuser_fastcache.artifacts.calibration import Fitted


def moved(fitted: Fitted, computed: int, levels: Sequence[float]) -> Fitted | None:
    """Return what is left of a calibration for another plan: one mask with its corrections.

    Each computed step goes to the nearest noise level that is free. A skipped step takes the
    weights of the same place in its gap, as a share of the gap's noise levels, linearly between
    the places that the file has.

    Args:
        fitted: the calibration.
        computed: steps of the mask.
        levels: of the other plan, falling.

    Returns:
        None where there is nothing to move: no such mask, none with corrections, where the plan
        computes half of its steps or more, whose gaps no longer are the file's, and where either
        plan takes a noise level twice, as Heun's schedulers do, so that a place is none.
    """
    mask = fitted.masks.get(computed)
    if mask is None or not len(fitted.steering) or 2 * computed >= len(levels):
        return None
    if any((np.diff(plan) >= 0).any() for plan in (fitted.noise_levels, levels)):
        return None
    at = sorted(fitted.masks).index(computed)
    new = _nearest([fitted.noise_levels[i] for i, flag in enumerate(mask) if flag], levels)
    of_file = _gaps(mask, fitted.noise_levels.tolist())
    of_plan = _gaps(new, levels)

    def weights_of(table: NDArray[np.float32]) -> NDArray[np.float32]:
        return _resampled(table[at : at + 1], of_file, of_plan, len(levels))

    none = (len(levels), 1, 2)
    return replace(
        fitted,
        noise_levels=np.asarray(levels, np.float64),
        weights=np.zeros((*none, 4), np.float32),
        slopes=np.full(none, np.inf),
        degrees=np.ones(none),
        masks={computed: new},
        steering=weights_of(fitted.steering),
        steering_guided=weights_of(fitted.steering_guided),
    )


def _nearest(wanted: Sequence[float], levels: Sequence[float]) -> list[int]:
    mask = np.zeros(len(levels), int)
    for level in wanted:
        distance = np.where(mask, np.inf, np.abs(np.asarray(levels) - level))
        mask[distance.argmin()] = 1
    return [int(flag) for flag in mask]


def _gaps(mask: Sequence[int], levels: Sequence[float]) -> list[tuple[int, NDArray[np.float64]]]:
    """Return for each computed step its index, and how far into its gap each skipped step is."""
    ends = [step for step, flag in enumerate(mask) if flag] + [len(mask)]
    known = np.append(np.asarray(levels, np.float64), 0.0)
    return [
        (first, (known[first] - known[first + 1 : end]) / (known[first] - known[end]))
        for first, end in zip(ends[:-1], ends[1:], strict=True)
    ]


def _resampled(
    table: NDArray[np.float32],
    of_file: list[tuple[int, NDArray[np.float64]]],
    of_plan: list[tuple[int, NDArray[np.float64]]],
    steps: int,
) -> NDArray[np.float32]:
    """Return a table of weights `(1 or 0, T, ...)` at the steps of another plan."""
    found = np.zeros((len(table), steps, *table.shape[2:]), np.float32)
    if not len(table):
        return found
    for (old, places), (new, wanted) in zip(of_file, of_plan, strict=True):
        found[0, new] = table[0, old]
        # A gap that the file does not have stays uncorrected.
        if len(places) and len(wanted):
            known = table[0, old + 1 : old + 1 + len(places)].reshape(len(places), -1)
            columns = [np.interp(wanted, places, column) for column in known.T]
            shape = (len(wanted), *table.shape[2:])
            found[0, new + 1 : new + 1 + len(wanted)] = np.stack(columns, axis=1).reshape(shape)
    return found

"""From records to what a cache needs: corrections, thresholds, scales, masks; and the audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xfuser_fastcache.artifacts.calibration import Cell, Fitted
from xfuser_fastcache.calibration.cells import (
    Tables,
    degrees_of,
    exponents_of,
    fit_weights,
    predictions,
    slopes_of,
    tables_of,
    upper_of,
)
from xfuser_fastcache.calibration.record import Trajectory
from xfuser_fastcache.calibration.replay import Counts, below, oracle, simulate
from xfuser_fastcache.calibration.risk import conformal_scale, least_generations
from xfuser_fastcache.reports.false_skips import false_skip_interval, false_skip_rate, harmful_share

# Shares of the generations to fit on and to hold out; the rest calibrates.
SHARES = (0.35, 0.15)
# Of the scalar lambda; fixed before any loss is seen.
SCALES = np.geomspace(0.05, 20.0, 240)
# How often scales between one that is allowed and one that is not are halved.
HALVINGS = 2
# FastCache's literal threshold on the squared relative change lies just above this.
LITERAL = 1.0

Generation = list[Trajectory]  # one a branch


@dataclass(frozen=True)
class Parts:
    """Generations by what they are used for; no generation is in two of them."""

    fit: list[Generation]
    held_out: list[Generation]
    calibrate: list[Generation]


def split(generations: Sequence[Generation]) -> Parts:
    """Split generations, in their order."""
    count = len(generations)
    first = round(SHARES[0] * count)
    second = first + round(SHARES[1] * count)
    return Parts(
        list(generations[:first]), list(generations[first:second]), list(generations[second:])
    )


def generations_needed(alphas: Sequence[float]) -> int:
    """Return how many generations have to be recorded for the smallest alpha."""
    return int(np.ceil(least_generations(min(alphas)) / (1 - sum(SHARES)))) + 1


def flat(generations: Sequence[Generation]) -> list[Trajectory]:
    """Return the trajectories of all branches."""
    return [trajectory for generation in generations for trajectory in generation]


def fit(
    parts: Parts,
    levels: NDArray[np.float64],
    lags: int,
    epsilon: float,
    metadata: dict[str, Any],
) -> Fitted:
    """Fit corrections and the prediction of errors; scales and masks are still missing.

    Args:
        parts: the records.
        levels: noise levels of the plan, `(T,)`.
        lags: largest lag between anchors.
        epsilon: error from which on a skip does harm, a ratio.
        metadata: for the file.
    """
    train, test = flat(parts.fit), flat(parts.held_out)
    weights = fit_weights(train, test, levels, lags)
    # The weights look a little better on what they were fitted to; the scale makes up for that.
    tables = tables_of([*train, *test], levels, weights)
    return Fitted(
        noise_levels=levels,
        weights=weights,
        **_prediction(tables),
        scales={},
        masks={},
        steering=np.zeros((0, len(levels), 5), np.float32),
        steering_guided=np.zeros((0, len(levels), 2, 5), np.float32),
        metadata={**metadata, "cache_ratio_threshold": epsilon},
    )


def without_corrections(fitted: Fitted, parts: Parts) -> Fitted:
    """Return the calibration of the plain extrapolation, with predictions of its own errors."""
    plain = np.zeros_like(fitted.weights)
    tables = tables_of(flat([*parts.fit, *parts.held_out]), fitted.noise_levels, plain)
    return replace(fitted, weights=plain, **_prediction(tables))


def _prediction(tables: Tables) -> dict[str, Any]:
    """Return what of a `Fitted` predicts errors."""
    exponents = exponents_of(tables)
    slopes = slopes_of(tables, exponents)
    return {
        "exponents": exponents,
        "slopes": slopes,
        "upper": upper_of(tables, slopes, exponents),
        "degrees": degrees_of(tables, exponents),
    }


def by_generation(counts: Counts, generations: Sequence[Generation]) -> Counts:
    """Add up the counts of the branches of each generation."""
    ends = np.cumsum([len(generation) for generation in generations])[:-1]
    parts = (np.split(values, ends) for values in (counts.skips, counts.harmful))
    skips, harmful = (np.array([part.sum() for part in found]) for found in parts)
    return Counts(skips, harmful)


def conformal_scales(
    fitted: Fitted, generations: Sequence[Generation], alphas: Sequence[float]
) -> dict[float, float]:
    """Return the scalar of the conformal test for each alpha, by playing the gate on records.

    Raises:
        ValueError: fewer generations than the smallest alpha needs.
    """
    epsilon = fitted.metadata["cache_ratio_threshold"]
    tables = tables_of(flat(generations), fitted.noise_levels, fitted.weights)
    predicted = predictions(tables, fitted.slopes, fitted.exponents)
    losses = np.empty((len(generations), len(SCALES)))
    for column, scale in enumerate(SCALES):
        gate = below(predicted, scale * epsilon)
        counts = by_generation(simulate(tables, epsilon, gate), generations)
        losses[:, column] = harmful_share(counts.harmful, counts.skips)
    return {alpha: conformal_scale(losses, SCALES, alpha) for alpha in alphas}


def settled_scale(first: float, allowed: Callable[[float], float]) -> float:
    """Return the scale that holds in the states that a cache visits.

    Full runs allow `first`; a run with a scale visits other states, which may allow less. What
    those of a larger scale allow is strict, since they are further from full ones. So the scales
    between are halved, twice: one whose own runs allow it is taken, or what they do allow.

    Args:
        first: one of `SCALES` or 0, the largest that may be taken.
        allowed: scale -> the largest scale that records with the cache on at it allow.

    Returns:
        One of `SCALES`, at most `first`; 0.0 where none is allowed.

    Source: docs/methods/calibrated.md, "Why calibrate twice".

    Example:
        >>> settled_scale(0.5, lambda scale: scale)
        0.5
        >>> settled_scale(SCALES[100], lambda scale: SCALES[40]) == float(SCALES[40])
        True
    """
    found = allowed(first) if first else 0.0
    if found >= first:
        return first
    low, high = (int(np.searchsorted(SCALES, scale, "right")) - 1 for scale in (found, first))
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        if middle == low:
            break
        found = allowed(SCALES[middle])
        if found >= SCALES[middle]:
            low = middle
        else:
            low, high = max(low, int(np.searchsorted(SCALES, found, "right")) - 1), middle
    return 0.0 if low < 0 else float(SCALES[low])


def audit(fitted: Fitted, generations: Sequence[Generation], epsilon: float) -> dict[str, Any]:
    """Say how often the skips of recorded generations did harm, beside other gates on them.

    Args:
        fitted: the calibration that they ran with.
        generations: recorded with the cache on.
        epsilon: error from which on a skip does harm, a ratio.
    """
    records = flat(generations)
    tables = tables_of(records, fitted.noise_levels, fitted.weights)

    def counted(harmful: NDArray[np.int64], skips: NDArray[np.int64]) -> dict[str, Any]:
        counts = by_generation(Counts(skips, harmful), generations)
        return {
            "false_skip_rate": false_skip_rate(counts.harmful, counts.skips),
            "false_skip_interval": false_skip_interval(counts.harmful, counts.skips),
            "skips": int(counts.skips.sum()),
            "hit_ratio": float(skips.sum() / (len(records) * len(fitted.noise_levels))),
        }

    def played(gate: Callable[[int, Cell], bool]) -> dict[str, Any]:
        counts = simulate(tables, epsilon, gate)
        return counted(counts.harmful, counts.skips)

    changes = np.broadcast_to(tables.changes[..., None], tables.errors.shape)
    errors = np.concatenate([record.errors[record.skipped] for record in records])
    quantiles = np.quantile(errors, (0.5, 0.9, 0.99, 1.0)) if len(errors) else [0.0] * 4
    skips = np.array([record.skipped.sum() for record in records])
    harmful = np.array([(record.errors[record.skipped] >= epsilon).sum() for record in records])
    return {
        **counted(harmful, skips),
        "generations": len(generations),
        "epsilon": epsilon,
        "error_quantiles": {
            "stack": dict(zip(("50", "90", "99", "100"), map(float, quantiles), strict=True))
        },
        "oracle": played(oracle(tables, epsilon)),
        "literal_test": played(below(changes, LITERAL)),
    }

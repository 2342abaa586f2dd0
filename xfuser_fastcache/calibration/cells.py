"""From records to tables by cell: corrections of forecasts, their errors, slopes of the gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xfuser_fastcache.artifacts.calibration import LARGEST_POWER, Cell
from xfuser_fastcache.calibration.record import Trajectory
from xfuser_fastcache.calibration.risk import degrees_of_freedom

# Ridge, as a share of each term's own energy.
CELL_RIDGE = 1e-3
# Of true over predicted errors, over generations: an upper one, so that few exceed it.
UPPER_QUANTILE = 0.9
# What corrections are made of, in terms of a cell's basis; see `basis`.
_TERMS = np.array(
    # last output, output before, true output, latents, latents at the last output
    [[1, -1, 0, 0, 0], [0, 0, 0, 1, -1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0]],
    dtype=float,
)


def cells(steps: int, lags: int) -> Iterator[Cell]:
    """Yield every cell of a plan whose anchors lie within it."""
    for step in range(1, steps):
        for lag in range(min(lags, step)):
            for spacing in range(min(lags, step - lag - 1) + 1):
                yield Cell(step, lag, spacing)


def anchors_of(cell: Cell) -> tuple[int, int]:
    """Return the steps of the last anchor and of the one before; the same twice without one."""
    last = cell.step - cell.lag - 1
    return last, last - cell.spacing


def basis(cell: Cell, steps: int) -> list[int]:
    """Return the rows of a Gram matrix that a cell's forecast and error are made of."""
    last, before = anchors_of(cell)
    return [last, before, cell.step, steps + cell.step, steps + last]


def extrapolation(cell: Cell, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the extrapolated output minus the true one, in terms of the cell's basis, `(5,)`."""
    last, before = anchors_of(cell)
    weight = 0.0
    if cell.spacing and levels[last] != levels[before]:
        weight = (levels[cell.step] - levels[last]) / (levels[last] - levels[before])
    return np.array([1 + weight, -weight, -1, 0, 0])


def error_vector(
    cell: Cell, levels: NDArray[np.float64], weights: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return a corrected forecast minus the true output, in terms of the cell's basis, `(5,)`.

    Args:
        cell: of the forecast.
        levels: noise levels of the plan.
        weights: of the corrections, `(T, G, G + 1, 4)`.
    """
    return extrapolation(cell, levels) + weights[cell] @ _TERMS


def _squares(vector: NDArray[np.float64], grams: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared norms of one vector under many Gram matrices `(n, 5, 5)`; rounding below 0 is 0."""
    return np.maximum(np.einsum("i,nij,j->n", vector, grams, vector), 0.0)


def _grams(
    trajectories: list[Trajectory], cell: Cell, relative: bool = True
) -> NDArray[np.float64]:
    rows = basis(cell, len(trajectories[0].skipped))
    grams = np.stack([t.gram[np.ix_(rows, rows)] for t in trajectories])
    return grams / grams[:, 2:3, 2:3] if relative else grams


def _ridge(grams: NDArray[np.float64], start: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of the terms that make `start` small: a ridge regression that shrinks to 0."""
    mean = grams.mean(axis=0)
    return ridge_weights(_TERMS @ mean @ _TERMS.T, -_TERMS @ mean @ start)


def ridge_weights(
    square: NDArray[np.float64], right: NDArray[np.float64], ridge: float = CELL_RIDGE
) -> NDArray[np.float64]:
    """Solve the normal equations of a ridge regression that shrinks to 0.

    Args:
        square: inner products of the terms, `(terms, terms)`.
        right: of the terms with what they are to make, `(terms,)`.
        ridge: share of a term's own product that is added to it.

    Returns:
        `(terms,)`; finite also where a term is 0 throughout.
    """
    added = ridge * np.diag(np.diag(square)) + 1e-12 * np.eye(len(square))
    return np.linalg.solve(square + added, right).astype(np.float64, copy=False)


def _helps(before: NDArray[np.float64], after: NDArray[np.float64]) -> bool:
    """Whether squared errors over held-out generations fell by more than their standard error."""
    gain = before - after
    return bool(len(gain) > 1 and gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)))


def fit_weights(
    fit: list[Trajectory],
    held_out: list[Trajectory],
    levels: NDArray[np.float64],
    lags: int,
) -> NDArray[np.float32]:
    """Fit the corrections of every cell.

    A cell's four weights minimise the mean squared relative error of its forecasts, with a ridge
    that shrinks to the plain extrapolation; where they do no better on generations held out, they
    are 0.

    Args:
        fit: trajectories to fit on.
        held_out: others.
        levels: noise levels of the plan, `(T,)`.
        lags: largest lag between anchors.

    Returns:
        `(T, G, G + 1, 4)`; see `Fitted`.
    """
    steps = len(levels)
    table = np.zeros((steps, lags, lags + 1, 4), np.float32)
    for cell in cells(steps, lags):
        start = extrapolation(cell, levels)
        train, test = _grams(fit, cell), _grams(held_out, cell)
        plain = _squares(start, test)
        weights = _ridge(train, start)
        if _helps(plain, _squares(start + weights @ _TERMS, test)):
            table[cell] = weights
    return table


@dataclass(frozen=True)
class Tables:
    """Of some trajectories: what a gate sees in each cell, and what a skip would do there.

    Attributes:
        changes: relative squared change of the latents, `(n, T, G)`.
        energies: mean square of the latents at the anchor, `(n, T, G)`.
        errors: relative error of the forecast, `(n, T, G, G + 1)`; NaN outside of the cells.
    """

    changes: NDArray[np.float64]
    energies: NDArray[np.float64]
    errors: NDArray[np.float64]

    def shape(self, exponents: tuple[float, float]) -> NDArray[np.float64]:
        """Return what errors are in proportion to in a cell: delta and rho to their powers.

        Args:
            exponents: see `exponents_of`.

        Returns:
            `(n, T, G, 1)`; NaN outside of the cells.
        """
        of_change, of_energy = exponents
        with np.errstate(divide="ignore", invalid="ignore"):
            powers = self.changes ** (of_change / 2) * self.energies ** (of_energy / 2)
        return powers[..., None]


def tables_of(
    trajectories: list[Trajectory],
    levels: NDArray[np.float64],
    weights: NDArray[np.float32],
) -> Tables:
    """Return changes, energies and errors in every cell."""
    steps, lags = weights.shape[:2]
    changes, energies = np.full((2, len(trajectories), steps, lags), np.nan)
    errors = np.full((len(trajectories), *weights.shape[:3]), np.nan)
    moved = np.array([0, 0, 0, 1.0, -1.0])
    for cell in cells(steps, lags):
        grams = _grams(trajectories, cell, relative=False)
        if cell.spacing == 0:
            energies[:, cell.step, cell.lag] = grams[:, 4, 4]
            changes[:, cell.step, cell.lag] = _squares(moved, grams) / grams[:, 4, 4]
        wrong = _squares(error_vector(cell, levels, weights), grams)
        errors[:, cell.step, cell.lag, cell.spacing] = np.sqrt(wrong / grams[:, 2, 2])
    return Tables(changes, energies, errors)


def exponents_of(tables: Tables) -> tuple[float, float]:
    """Return the powers that errors follow within cells, of delta and of rho.

    delta is the relative change of the latents, rho their root mean square at the anchor. A
    regression of log error on their logs, each centred in its cell, pooled over all cells; 0 for
    what does not vary. What few trajectories say is held within what a file may say.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.log(tables.errors)
        seen = np.stack((tables.changes, tables.energies))
        logs = np.broadcast_to(np.log(seen)[..., None] / 2, (2, *errors.shape))
    known = np.isfinite(errors).all(axis=0) & np.isfinite(logs).all(axis=(0, 1))
    y, x = errors[:, known], logs[:, :, known]
    y = (y - y.mean(axis=0)).ravel()
    x = (x - x.mean(axis=1, keepdims=True)).reshape(2, -1)
    found = np.clip(ridge_weights(x @ x.T, x @ y), -LARGEST_POWER, LARGEST_POWER)
    of_change, of_energy = found.tolist()
    return of_change, of_energy


def slopes_of(tables: Tables, exponents: tuple[float, float]) -> NDArray[np.float64]:
    """Return the median of error over what it is in proportion to, `(T, G, G + 1)`."""
    moved = np.all(tables.changes > 0, axis=0)[..., None]
    known = np.isfinite(tables.errors).all(axis=0) & moved
    slopes = np.full(known.shape, np.inf)
    shape = np.broadcast_to(tables.shape(exponents), tables.errors.shape)
    ratios = tables.errors[:, known] / shape[:, known]
    slopes[known] = np.maximum(np.median(ratios, axis=0), 1e-9)
    return slopes


def predictions(
    tables: Tables, slopes: NDArray[np.float64], exponents: tuple[float, float]
) -> NDArray[np.float64]:
    """Return the error that a skip is predicted to make, as `Fitted.predicted_error` does.

    Returns:
        `(n, T, G, G + 1)`; infinite where nothing was seen, NaN outside of the cells.
    """
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(slopes), np.inf, slopes * tables.shape(exponents))


def upper_of(tables: Tables, slopes: NDArray[np.float64], exponents: tuple[float, float]) -> float:
    """Return an upper quantile of true over predicted errors, over all cells and trajectories."""
    known = np.isfinite(slopes)
    if not known.any():
        return 1.0
    ratios = tables.errors[:, known] / predictions(tables, slopes, exponents)[:, known]
    return float(np.quantile(ratios, UPPER_QUANTILE))


def degrees_of(tables: Tables, exponents: tuple[float, float]) -> NDArray[np.float64]:
    """Return the degrees of freedom of the predicted squared error, `(T, G, G + 1)`; 1 if unknown.

    In a cell that is in proportion to the square of `Tables.shape`.
    """
    degrees = np.ones(tables.errors.shape[1:])
    squares = tables.shape(exponents)[..., 0] ** 2
    for step, lag in np.argwhere(np.all(tables.changes > 0, axis=0)):
        degrees[step, lag] = degrees_of_freedom(squares[:, step, lag])
    return degrees

"""What a gate would do on a record: its skips, the harmful ones among them, and an oracle's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xfuser_fastcache.artifacts.calibration import Cell
from xfuser_fastcache.calibration.cells import Tables


@dataclass(frozen=True)
class Counts:
    """Of each trajectory, `(n,)` each.

    Attributes:
        skips: skipped steps.
        harmful: those whose error is epsilon or more.
    """

    skips: NDArray[np.int64]
    harmful: NDArray[np.int64]


def simulate(
    tables: Tables,
    epsilon: float,
    may_skip: Callable[[int, Cell], bool],
) -> Counts:
    """Play a gate through records of full computation.

    The rules are the engine's with a calibration: the first step and the last one are computed, as
    is every step whose anchor lies further back than the tables reach, and that at which another
    denoiser takes over, which has no older anchor.

    Args:
        tables: of the records.
        epsilon: error from which on a skip does harm, a ratio.
        may_skip: (index of the trajectory, cell) -> the gate's answer.
    """
    count, steps, lags = tables.changes.shape
    skips, harmful = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for index in range(count):
        last = before = 0
        for step in range(1, steps):
            if step in tables.entries:
                last = before = step
                continue
            cell = Cell(step, step - last - 1, last - before)
            within = cell.lag < lags and cell.spacing <= lags
            forced = step == steps - 1 or not within
            if not forced and may_skip(index, cell):
                skips[index] += 1
                harmful[index] += tables.errors[index][cell] >= epsilon
            else:
                last, before = step, last
    return Counts(skips, harmful)


def below(values: NDArray[np.float64], limit: float) -> Callable[[int, Cell], bool]:
    """Return a gate that skips where a value, `(n, T, G, G + 1)`, is below a limit."""

    def may_skip(index: int, cell: Cell) -> bool:
        return bool(values[index][cell] < limit)

    return may_skip


def oracle(tables: Tables, epsilon: float) -> Callable[[int, Cell], bool]:
    """Return the gate that knows the true error and skips wherever it does no harm."""

    def may_skip(index: int, cell: Cell) -> bool:
        return bool(tables.errors[index][cell] < epsilon)

    return may_skip

"""Which steps to compute: the mask of a given number of steps whose errors matter least."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xfuser_fastcache.artifacts.calibration import Cell
from xfuser_fastcache.calibration.cells import basis, error_vector, extrapolation
from xfuser_fastcache.calibration.record import Trajectory


def step_impact(
    moved: NDArray[np.float64], records: list[Trajectory], levels: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how far an error of the output moves the final latents, by step, `(T,)`.

    Args:
        moved: root mean square of the final latents' distance from those of full computation where
            that step alone was skipped and its output extrapolated, `(n, T)`.
        records: the same generations with full computation, `n` trajectories or a multiple.
        levels: noise levels of the plan.
    """
    steps = len(levels)
    impact = np.zeros(steps)
    for step in range(1, steps):
        cell = Cell(step, 0, min(1, step - 1))
        rows, vector = basis(cell, steps), extrapolation(cell, levels)
        made = [vector @ record.gram[np.ix_(rows, rows)] @ vector for record in records]
        # Every generation has as many branches, whose errors all take part.
        impact[step] = np.sqrt((moved[:, step] ** 2).sum() / max(np.sum(made), 1e-30))
    return impact


class MaskSearch:
    """Finds masks by dynamic programming over pairs of anchors, exactly for its model of harm.

    The model: an error of the output at step t moves the final latents by `impact[t]` times itself.
    Errors of the steps between two computed ones have one cause, so they add up as vectors; those
    of different gaps add up in their squares.

    Args:
        trajectories: records of full computation.
        levels: noise levels of the plan, `(T,)`.
        weights: of the corrected forecast, `(T, G, G + 1, 4)`.
        impact: of each step, `(T,)`.
    """

    def __init__(
        self,
        trajectories: list[Trajectory],
        levels: NDArray[np.float64],
        weights: NDArray[np.float32],
        impact: NDArray[np.float64],
    ):
        self.steps, self.lags = weights.shape[:2]
        self.levels, self.weights, self.impact = levels, weights, impact
        self.gram = np.mean([t.gram for t in trajectories], axis=0)
        self.entries = trajectories[0].entries.tolist()
        self.cost = lru_cache(None)(self._cost)

    def _cost(self, before: int, last: int, end: int) -> float:
        """Squared error of the steps between `last` and `end`, both computed; inf out of reach."""
        # A denoiser that takes over computes its first step, and has no anchor before it.
        spacing = 0 if last in self.entries else last - before
        if any(last < entry < end for entry in self.entries):
            return float("inf")
        if end == last + 1:
            return 0.0
        if spacing > self.lags or end - last - 1 > self.lags:
            return float("inf")
        total = np.zeros(2 * self.steps)
        for step in range(last + 1, end):
            cell = Cell(step, step - last - 1, spacing)
            rows = basis(cell, self.steps)
            vector = self.impact[step] * error_vector(cell, self.levels, self.weights)
            np.add.at(total, rows, vector)
        return float(max(total @ self.gram @ total, 0.0))

    def best(self, computed: int) -> list[int]:
        """Return the best mask of `computed` steps.

        Raises:
            ValueError: no mask of so few steps keeps within the lags that were looked at.
        """
        # (anchor before, last anchor) -> (cost so far, computed steps).
        front: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, (0,))}
        for _ in range(computed - 1):
            reached: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
            for (before, last), (cost, chosen) in front.items():
                for end in range(last + 1, self.steps):
                    total = cost + self.cost(before, last, end)
                    if total < reached.get((last, end), (float("inf"), ()))[0]:
                        reached[last, end] = total, (*chosen, end)
            front = reached
        ends = [
            (cost + self.cost(before, last, self.steps), chosen)
            for (before, last), (cost, chosen) in front.items()
        ]
        cost, chosen = min(ends, default=(float("inf"), ()))
        if not np.isfinite(cost):
            raise ValueError(
                f"{computed} of {self.steps} steps leave gaps of more than the {self.lags} steps "
                "that were looked at; give a larger --max_lag or more steps"
            )
        return [int(step in chosen) for step in range(self.steps)]

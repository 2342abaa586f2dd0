"""Which linear map a span gets: form, rank and ridge by held-out generations, or none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from xfuser_fastcache.artifacts.linear_map import LinearMap
from xfuser_fastcache.calibration.ridge import FORMS, Form, Regression, RidgeSums, error, pooled

RANKS = (4, 16, 64)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# A map replaces `reuse` where its mean improvement is above this many of its standard errors.
MARGIN = 2.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One fitted map and how it did on held-out generations.

    Attributes:
        form, rank, ridge: as given to `fit`.
        multiply_adds_per_token: its cost.
        held_out_error: mean over generations of `error`.
        improvement: mean over generations of how much lower that is than the error of `reuse`.
        standard_error: of the improvement, over generations.
    """

    form: Form
    rank: int
    ridge: float
    multiply_adds_per_token: int
    held_out_error: float
    improvement: float
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `choose` chose.

    Attributes:
        linear_map: None where nothing clearly beats `reuse`.
        candidate: its row of the table, or None.
        held_out_error: of what was chosen; not a number without held-out generations. It is the
            lowest of many and so a little low: quote errors from generations of a third split.
        reuse_error: of `reuse`, on the same generations.
        table: all candidates, in the order of fitting.
    """

    linear_map: LinearMap | None
    candidate: Candidate | None
    held_out_error: float
    reuse_error: float
    table: tuple[Candidate, ...]


def choose(
    fit_sums: Sequence[RidgeSums],
    held_out: Sequence[RidgeSums],
    forms: Sequence[Form] = FORMS,
    ranks: Sequence[int] = RANKS,
    ridges: Sequence[float] = RIDGES,
    margin: float = MARGIN,
) -> Choice:
    """Choose form, rank and ridge by the error on held-out generations, or `reuse`.

    Every candidate is fitted on all of `fit_sums` together. One stands where its improvement over
    `reuse`, averaged over held-out generations, is above `margin` standard errors. Tokens and steps
    of one generation are correlated, so generations alone are counted as independent. Of those that
    stand the one with the lowest error is the best; the cheapest one whose error exceeds the best's
    by no more than one standard error of the difference is chosen, and of several equally cheap
    ones that with the lowest error. Where none stands, where there was nothing to fit on, or where
    fewer than two held-out generations have tokens, `reuse` is chosen.

    Args:
        fit_sums: one a generation, or already merged.
        held_out: one a generation, of generations that are not in `fit_sums`; empty ones are passed
            over.
        forms: of `FORMS`.
        ranks: for the low rank; those with 2r >= D are left out, since the full form is cheaper.
        ridges: see `fit`.
        margin: in standard errors.

    Raises:
        ValueError: `fit_sums` is empty, or as `fit`.
    """
    if not fit_sums:
        raise ValueError("fit_sums is empty; allowed: one or more RidgeSums")
    pool = pooled(fit_sums)
    judges = [sums for sums in held_out if sums.tokens]

    def judged(linear_map: LinearMap | None) -> torch.Tensor:
        return torch.tensor([error(sums, linear_map) for sums in judges], dtype=torch.float64)

    reuse = judged(None)
    regression = Regression(pool)
    rows: list[_Row] = []
    for form, rank, ridge in _grid(pool, judges, forms, ranks, ridges):
        fitted = regression.fit(form, rank, ridge)
        errors = judged(fitted)
        gain, doubt = _mean_and_standard_error(reuse - errors)
        candidate = Candidate(
            form=form,
            rank=rank,
            ridge=ridge,
            multiply_adds_per_token=fitted.multiply_adds_per_token,
            held_out_error=errors.mean().item(),
            improvement=gain,
            standard_error=doubt,
        )
        rows.append(_Row(candidate, fitted, errors))
    reuse_error = reuse.mean().item()
    chosen = _cheapest_of_the_best(rows, margin)
    return Choice(
        linear_map=chosen.linear_map if chosen else None,
        candidate=chosen.candidate if chosen else None,
        held_out_error=chosen.candidate.held_out_error if chosen else reuse_error,
        reuse_error=reuse_error,
        table=tuple(row.candidate for row in rows),
    )


def gap_edges(noise_levels: Sequence[float], max_lag: int, buckets: int) -> tuple[float, ...]:
    """Return bucket edges for `SpanMaps` that part the gaps of a schedule into equal shares.

    Edges lie halfway between gaps that differ, so that rounding moves no pair to another bucket;
    the last one 1 % above the largest gap. Evenly spaced levels give whole lags.

    Args:
        noise_levels: sigma of each step, in order.
        max_lag: longest distance from an anchor, in steps, from 1.
        buckets: how many; fewer come back where there are not so many different gaps.

    Example:
        >>> [round(edge, 3) for edge in gap_edges([1.0, 0.75, 0.5, 0.25], max_lag=2, buckets=3)]
        [0.375, 0.505]
    """
    gaps = sorted(
        abs(level - later)
        for lag in range(1, max_lag + 1)
        for level, later in zip(noise_levels, noise_levels[lag:], strict=False)
        if level != later
    )
    if not gaps or buckets < 1:
        raise ValueError(
            f"{len(noise_levels)} noise levels, max_lag {max_lag} and {buckets} buckets leave no "
            "gap to part; allowed: at least two different levels, max_lag and buckets from 1"
        )
    parts = [i for i in range(1, len(gaps)) if gaps[i] > 1.001 * gaps[i - 1]]
    shares = [len(gaps) * share / buckets for share in range(1, buckets)]
    cuts = {min(parts, key=lambda part: abs(part - share)) for share in shares if parts}
    return (*((gaps[cut - 1] + gaps[cut]) / 2 for cut in sorted(cuts)), 1.01 * gaps[-1])


@dataclass(frozen=True)
class _Row:
    """A candidate with its map and its error on each held-out generation."""

    candidate: Candidate
    linear_map: LinearMap
    errors: torch.Tensor


def _grid(
    pool: RidgeSums,
    judges: Sequence[RidgeSums],
    forms: Sequence[Form],
    ranks: Sequence[int],
    ridges: Sequence[float],
) -> Iterator[tuple[Form, int, float]]:
    if not pool.tokens or len(judges) < 2:
        return
    for form in forms:
        for rank in [r for r in ranks if 2 * r < pool.dim] if form == "low_rank" else [0]:
            for ridge in ridges:
                yield form, rank, ridge


def _cheapest_of_the_best(rows: Sequence[_Row], margin: float) -> _Row | None:
    """Apply the rule of `choose`."""
    standing = [
        row for row in rows if row.candidate.improvement > margin * row.candidate.standard_error
    ]
    if not standing:
        return None
    best = min(standing, key=lambda row: row.candidate.held_out_error)

    def as_good(row: _Row) -> bool:
        loss, doubt = _mean_and_standard_error(row.errors - best.errors)
        return loss <= doubt

    return min(
        filter(as_good, standing),
        key=lambda row: (row.candidate.multiply_adds_per_token, row.candidate.held_out_error),
    )


def _mean_and_standard_error(values: torch.Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / math.sqrt(len(values))

"""Masks of computed steps: the search against all masks, its model of harm, evenly spaced ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.calibrations import even_levels, smooth, trajectory

from xfuser_fastcache.calibration.search import MaskSearch, step_impact
from xfuser_fastcache.clock.schedule import even_mask

T = 7
LEVELS = even_levels(T) ** 1.3


def weights_of(lags: int, seed: int = 0, size: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (size * rng.normal(size=(T, lags, lags + 1, 4))).astype(np.float32)


def forecast_error(
    step: int,
    last: int,
    before: int,
    vectors: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray,
) -> np.ndarray:
    """A forecast minus the true output, from the vectors."""
    outputs, latents = vectors
    f0, f1 = outputs[last], outputs[before]
    w = 0.0
    if last != before:
        w = (LEVELS[step] - LEVELS[last]) / (LEVELS[last] - LEVELS[before])
    given = weights[step, step - last - 1, last - before].astype(float)
    terms = f0 - f1, latents[step] - latents[last], f0, latents[step]
    return (
        f0 + w * (f0 - f1) + sum(w * t for w, t in zip(given, terms, strict=True)) - outputs[step]
    )


def harm(
    mask: tuple[int, ...],
    records: list[tuple[np.ndarray, np.ndarray]],
    weights: np.ndarray,
    impact: np.ndarray,
) -> float:
    """What the search minimises, by its definition; infinite where a gap was not looked at."""
    lags = weights.shape[1]
    computed = [step for step in range(T) if mask[step]]
    total = 0.0
    for index, last in enumerate(computed):
        before = computed[max(index - 1, 0)]
        skipped = range(last + 1, [*computed, T][index + 1])
        if skipped and (len(skipped) > lags or last - before > lags):
            return np.inf
        for vectors in records if skipped else ():
            error = sum(
                impact[step] * forecast_error(step, last, before, vectors, weights)
                for step in skipped
            )
            total += float(error @ error) / len(records)
    return total


@pytest.mark.parametrize("lags", [1, 2, 6])
@pytest.mark.parametrize("computed", range(1, T + 1))
@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_best_of_all_masks(seed: int, computed: int, lags: int) -> None:
    records = [smooth(10 * seed + i, T) for i in range(3)]
    weights, impact = weights_of(lags, seed), np.random.default_rng(seed).uniform(0.2, 2.0, T)
    seeker = MaskSearch([trajectory(*r) for r in records], LEVELS, weights, impact)
    masks = [mask for mask in itertools.product((0, 1), repeat=T) if mask[0]]
    harms = {m: harm(m, records, weights, impact) for m in masks if sum(m) == computed}
    least = min(harms.values())
    if not np.isfinite(least):
        words = f"{computed} of {T} steps leave gaps of more than the {lags} steps"
        with pytest.raises(ValueError, match=words):
            seeker.best(computed)
        return
    found = seeker.best(computed)
    assert sum(found) == computed and found[0] == 1
    assert harms[tuple(found)] == pytest.approx(least, rel=1e-6, abs=1e-12)


def test_a_step_that_matters_is_computed() -> None:
    records = [trajectory(*smooth(seed, T)) for seed in range(3)]
    impact = np.full(T, 1e-6)
    impact[4] = 1.0
    assert MaskSearch(records, LEVELS, weights_of(6), impact).best(2) == [1, 0, 0, 0, 1, 0, 0]


def test_errors_within_a_gap_may_cancel_and_those_of_two_gaps_do_not() -> None:
    """Outputs that stray to both sides of what stands still; an impact of 1 everywhere."""
    outputs = np.ones((T, 1))
    outputs[2], outputs[3] = 1.5, 0.5
    record = trajectory(outputs, np.ones((T, 1)))
    none = np.zeros((T, 6, 7, 4), np.float32)
    seeker = MaskSearch([record], LEVELS, none, np.ones(T))
    assert seeker.cost(0, 1, 4) == pytest.approx(0.0, abs=1e-12)
    assert seeker.cost(0, 1, 3) == pytest.approx(0.25)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 28, 50])
def test_an_even_mask_has_as_many_steps_as_asked(steps: int, last: bool) -> None:
    for computed in range(1, steps + 1):
        mask = even_mask(steps, computed, last)
        assert (len(mask), sum(mask), mask[0]) == (steps, computed, 1)
        kept = [step for step, flag in enumerate(mask) if flag]
        # With the last step computed the gaps lie between; else one more ends the run.
        gaps = np.diff(kept if last and computed > 1 else [*kept, steps])
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
        assert not last or computed == 1 or mask[-1] == 1


@pytest.mark.parametrize("branches", [1, 2])
def test_the_impact_is_what_an_error_of_the_output_moves_the_latents_by(branches: int) -> None:
    """Known answer: final latents move by so much a step times the error that was made there."""
    records = [smooth(seed, T) for seed in range(2 * branches)]
    wanted = np.array([0.0, 3.0, 1.0, 0.5, 2.0, 0.1, 0.7])
    none = np.zeros((T, 1, 2, 4), np.float32)
    made = np.zeros((len(records), T))
    for index, vectors in enumerate(records):
        for step in range(1, T):
            error = forecast_error(step, step - 1, max(step - 2, 0), vectors, none)
            made[index, step] = np.sqrt(np.square(error).mean())
    # The errors of a generation's branches take part with equal weight.
    joint = np.sqrt((made.reshape(2, branches, T) ** 2).sum(axis=1))
    found = step_impact(wanted * joint, [trajectory(*r) for r in records], LEVELS)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_forecast_without_error_has_no_impact() -> None:
    outputs = LEVELS[:, None] * np.ones((T, 3))
    found = step_impact(np.zeros((1, T)), [trajectory(outputs, outputs)], LEVELS)
    assert np.isfinite(found).all() and not found.any()

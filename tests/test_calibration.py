"""From records to tables, scales and masks: on synthetic trajectories whose vectors are at hand.

Whatever is computed from inner products is computed here once more from the vectors themselves;
what a gate is said to do on a record is what the engine does with the record's latents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.calibrations import even_levels, fitted_on, smooth, trajectory
from support.stack import WholeForward, plan_of

from xfuser_fastcache import CacheConfig
from xfuser_fastcache.artifacts.calibration import LARGEST_POWER, Cell, Fitted
from xfuser_fastcache.calibration import build
from xfuser_fastcache.calibration.cells import (
    CELL_RIDGE,
    UPPER_QUANTILE,
    Tables,
    anchors_of,
    cells,
    degrees_of,
    exponents_of,
    fit_weights,
    predictions,
    slopes_of,
    tables_of,
    upper_of,
)
from xfuser_fastcache.calibration.replay import Counts, below, oracle, simulate
from xfuser_fastcache.calibration.risk import least_generations
from xfuser_fastcache.reports.false_skips import harmful_share

T, LAGS = 8, 3
# Unevenly spaced, as a shifted schedule is.
LEVELS = even_levels(T) ** 1.3
Vectors = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_weights(seed: int = 0, size: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (size * rng.normal(size=(T, LAGS, LAGS + 1, 4))).astype(np.float32)


def forecast(cell: Cell, vectors: Vectors, weights: np.ndarray) -> np.ndarray:
    """The forecast in a cell, from the vectors, as `OutputForecaster` describes it."""
    outputs, latents = vectors
    last = cell.step - cell.lag - 1
    f0, f1 = outputs[last], outputs[last - cell.spacing]
    made = f0.copy()
    if cell.spacing:
        made += (
            (f0 - f1)
            * (LEVELS[cell.step] - LEVELS[last])
            / (LEVELS[last] - LEVELS[last - cell.spacing])
        )
    terms = f0 - f1, latents[cell.step] - latents[last], f0, latents[cell.step]
    return made + sum(w * term for w, term in zip(weights[cell].astype(float), terms, strict=True))


def relative(made: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(made - true) / np.linalg.norm(true))


# ---- cells --------------------------------------------------------------------------------------


def test_every_cell_whose_anchors_lie_in_the_plan_is_there_once() -> None:
    wanted = set()
    for step, last, before in itertools.product(range(T), repeat=3):
        if before <= last < step and step - last <= LAGS and last - before <= LAGS:
            wanted.add(Cell(step, step - last - 1, last - before))
    found = list(cells(T, LAGS))
    assert len(found) == len(set(found)) and set(found) == wanted
    assert anchors_of(Cell(step=6, lag=1, spacing=3)) == (4, 1)


@pytest.mark.parametrize("size", [0.0, 0.1], ids=["plain", "corrected"])
def test_changes_and_errors_are_those_of_the_vectors(size: float) -> None:
    weights, vectors = random_weights(size=size), [smooth(seed, T) for seed in range(3)]
    found = tables_of([trajectory(*v) for v in vectors], LEVELS, weights)
    known = set(cells(T, LAGS))
    for index, (outputs, latents) in enumerate(vectors):
        for cell in map(Cell._make, np.ndindex(T, LAGS, LAGS + 1)):
            error = found.errors[index][cell]
            if cell not in known:
                assert np.isnan(error)
                continue
            wanted = relative(forecast(cell, (outputs, latents), weights), outputs[cell.step])
            assert error == pytest.approx(wanted, rel=1e-6, abs=1e-9)
            x, x0 = latents[cell.step], latents[anchors_of(cell)[0]]
            change = found.changes[index, cell.step, cell.lag]
            assert change == pytest.approx(relative(x, x0) ** 2)
            energy = found.energies[index, cell.step, cell.lag]
            assert energy == pytest.approx(np.square(x0).mean())


# ---- corrections --------------------------------------------------------------------------------

PLANTED = Cell(step=5, lag=1, spacing=2)


def planted(seed: int, weights: Any, noise: float = 0.0, numbers: int = 4000) -> Vectors:
    """Return random vectors whose output at `PLANTED` is the forecast with these weights."""
    rng = np.random.default_rng(seed)
    outputs, latents = rng.normal(size=(2, T, numbers))
    table = np.zeros((T, LAGS, LAGS + 1, 4), np.float32)
    table[PLANTED] = weights
    made = forecast(PLANTED, (outputs, latents), table)
    outputs[PLANTED.step] = made + noise * rng.normal(size=numbers)
    return outputs, latents


def records(seeds: range, *given: Any, **options: Any) -> list[Any]:
    return [trajectory(*planted(seed, *given, **options)) for seed in seeds]


@pytest.mark.parametrize("weights", [(0.4, -0.3, 0.2, 0.1), (0.0, 0.5, 0.0, 0.0)])
def test_a_planted_correction_is_found(weights: tuple[float, ...]) -> None:
    fit, held_out = records(range(4), weights, 0.1), records(range(4, 8), weights, 0.1)
    found = fit_weights(fit, held_out, LEVELS, LAGS)
    np.testing.assert_allclose(found[PLANTED], weights, atol=5e-3)
    assert found.dtype == np.float32


def test_a_correction_that_does_not_help_on_others_is_left_out() -> None:
    fit, useless = records(range(4), (0.4, -0.3, 0.2, 0.1)), records(range(4, 8), (0, 0, 0, 0), 0.1)
    assert not fit_weights(fit, useless, LEVELS, LAGS)[PLANTED].any()
    # A single generation held out tells nothing of how generations differ.
    assert not fit_weights(fit, fit[:1], LEVELS, LAGS).any()


def test_a_correction_that_helps_one_generation_and_harms_another_is_left_out() -> None:
    mixed = records(range(4, 6), (0.4, 0, 0, 0), 0.1) + records(range(6, 8), (-0.4, 0, 0, 0), 0.1)
    fit = records(range(4), (0.4, 0, 0, 0), 0.1)
    assert not fit_weights(fit, mixed, LEVELS, LAGS)[PLANTED].any()
    # Nor where it helps a little on average: two such generations may as well have it otherwise.
    mixed = records(range(4, 5), (0.4, 0, 0, 0), 0.1) + records(range(5, 6), (0.12, 0, 0, 0), 0.1)
    assert not fit_weights(fit, mixed, LEVELS, LAGS)[PLANTED].any()


def test_the_ridge_shrinks_by_its_share() -> None:
    """Terms that are orthogonal, or that are 0 and stay out: a closed form."""
    cell, last = Cell(2, 0, 0), 1
    eye = np.eye(3)
    outputs, latents = np.tile(eye[2], (T, 1)), np.tile(eye[1], (T, 1))
    outputs[last] = eye[0]
    outputs[cell.step] = 1.5 * eye[0] + 0.25 * eye[1]
    same = [trajectory(outputs, latents)] * 2
    # Alike generations leave no doubt, so what helps helps for certain.
    found = fit_weights(same, same, LEVELS, LAGS)
    shrunk = 1 / (1 + CELL_RIDGE)
    np.testing.assert_allclose(found[cell], (0, 0, 0.5 * shrunk, 0.25 * shrunk), atol=1e-7)


# ---- predicted errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("exponents", [(1.0, 0.0), (0.0, 0.0), (-0.7, 0.4), (0.0, 2.0)])
def test_predictions_are_medians_and_moments_of_each_cell(exponents: tuple[float, float]) -> None:
    tables = tables_of([trajectory(*smooth(s, T)) for s in range(12)], LEVELS, random_weights())
    slopes, degrees = slopes_of(tables, exponents), degrees_of(tables, exponents)
    predicted = predictions(tables, slopes, exponents)
    fitted = fitted_on(LEVELS, LAGS, slopes=slopes, exponents=exponents)
    known = set(cells(T, LAGS))
    over = []
    for cell in map(Cell._make, np.ndindex(T, LAGS, LAGS + 1)):
        if cell not in known:
            assert slopes[cell] == np.inf and not (predicted[(slice(None), *cell)] < np.inf).any()
            assert fitted.predicted_error(cell, 1.0, 1.0) is None
            continue
        step, lag, spacing = cell
        changes, energies = tables.changes[:, step, lag], tables.energies[:, step, lag]
        squares = changes ** exponents[0] * energies ** exponents[1]
        ratios = tables.errors[:, step, lag, spacing] / np.sqrt(squares)
        assert slopes[cell] == pytest.approx(np.median(ratios))
        over += (ratios / np.median(ratios)).tolist()
        varies = any(exponents)
        nu = max(1.0, 2 * squares.mean() ** 2 / squares.var(ddof=1)) if varies else math.inf
        assert degrees[cell] == pytest.approx(nu)
        for index, seen in enumerate(zip(changes, energies, strict=True)):
            found = fitted.predicted_error(cell, *map(float, seen))
            assert predicted[index][cell] == pytest.approx(found)
    assert upper_of(tables, slopes, exponents) == pytest.approx(np.quantile(over, UPPER_QUANTILE))


@pytest.mark.parametrize("exponents", [(1.0, 0.0), (0.3, 0.5), (-0.7, 1.2), (0.0, -2.0)])
def test_exponents_of_errors_that_follow_powers_are_found(exponents: tuple[float, float]) -> None:
    """Whatever the cells' own levels; noise that does not depend on the change leaves it alone."""
    tables = tables_of([trajectory(*smooth(s, T)) for s in range(40)], LEVELS, random_weights())
    rng = np.random.default_rng(0)
    level = rng.lognormal(0.0, 1.0, tables.errors.shape[1:])
    noise = rng.lognormal(0.0, 0.05, tables.errors.shape)
    delta, rho = (np.sqrt(seen)[..., None] for seen in (tables.changes, tables.energies))
    errors = level * noise * delta ** exponents[0] * rho ** exponents[1]
    errors[np.isnan(tables.errors)] = np.nan
    found = exponents_of(Tables(tables.changes, tables.energies, errors))
    assert found == pytest.approx(exponents, abs=0.03)


def test_exponents_stay_within_what_a_file_may_say() -> None:
    """Few trajectories may seem to follow any power."""
    tables = tables_of([trajectory(*smooth(s, T)) for s in range(3)], LEVELS, random_weights())
    errors = np.sqrt(tables.changes)[..., None] ** 40.0 + 0.0 * tables.errors
    found = exponents_of(Tables(tables.changes, tables.energies, errors))
    assert found == pytest.approx((LARGEST_POWER, 0.0), abs=0.5) and found[0] <= LARGEST_POWER


def test_where_nothing_varies_there_is_no_exponent() -> None:
    same = [trajectory(*smooth(0, T))] * 3
    found = exponents_of(tables_of(same, LEVELS, random_weights()))
    assert found == pytest.approx((0.0, 0.0), abs=1e-9)


def test_a_change_of_nothing_has_no_slope() -> None:
    outputs, latents = smooth(0, T)
    latents[4] = latents[3]
    still = trajectory(np.ones((T, 40)), latents)
    none = np.zeros_like(random_weights())
    for exponents in ((1.0, 0.0), (-0.7, 0.5)):
        for others in ([], [trajectory(*smooth(1, T))], [still]):
            tables = tables_of([trajectory(outputs, latents), *others], LEVELS, none)
            slopes = slopes_of(tables, exponents)
            assert (slopes[4, 0] == np.inf).all() and np.isfinite(slopes[4, 1, 0])
            assert np.isfinite(exponents_of(tables)).all()
        # Where neither changes, too.
        tables = tables_of([still, trajectory(*smooth(1, T))], LEVELS, none)
        assert (slopes_of(tables, exponents)[4, 0] == np.inf).all()


# ---- what a gate does on a record ---------------------------------------------------------------

EPSILON = 0.2


def run_engine(fitted: Fitted, vectors: Vectors) -> tuple[list[int], list[float]]:
    """Feed a record's latents to an engine; return flags and the error of each step's output.

    The forward pass puts out what the record says, and the latents do not depend on it.
    """
    config = CacheConfig(calibration="x").resolved(fitted)
    run, plan, errors = WholeForward(config, 4, fitted=fitted), plan_of(*LEVELS.tolist()), []
    for level, truth, x in zip(LEVELS.tolist(), *vectors, strict=True):
        truth, x = (torch.from_numpy(v).reshape(1, -1, 4) for v in (truth, x))
        (made,) = run(lambda _, truth=truth: (truth,), x, level, plan=plan)
        errors.append(float((made - truth).norm() / truth.norm()))
    return run.flags, errors


def a_fitted(seed: int = 0, **changes: Any) -> Fitted:
    """Return a calibration with random weights, and slopes that let about half of the steps by."""
    fitted = fitted_on(LEVELS, LAGS, weights=random_weights(seed, 0.05), **changes)
    fitted.metadata["cache_ratio_threshold"] = EPSILON
    shape = fitted.slopes.shape
    fitted.slopes[:] = np.random.default_rng(seed).lognormal(0.5, 1.0, shape)
    return fitted


def test_a_gate_is_played_on_a_record_as_the_engine_runs_it() -> None:
    vectors = [smooth(seed, T) for seed in range(12)]
    counts = []
    for seed in range(4):
        exponents = ((1.0, 0.0), (0.3, 0.6), (-0.7, -0.4), (0.0, 0.0))[seed]
        fitted = a_fitted(seed, exponents=exponents)
        tables = tables_of([trajectory(*v) for v in vectors], LEVELS, fitted.weights)
        gate = below(predictions(tables, fitted.slopes, fitted.exponents), EPSILON)
        found = simulate(tables, EPSILON, gate)
        for index, one in enumerate(vectors):
            flags, errors = run_engine(fitted, one)
            skipped = [error for flag, error in zip(flags, errors, strict=True) if flag]
            harmful = sum(error >= EPSILON for error in skipped)
            assert (found.skips[index], found.harmful[index]) == (len(skipped), harmful)
            assert not any(e for flag, e in zip(flags, errors, strict=True) if not flag)
            counts.append((len(skipped), harmful))
    # Enough of all kinds, that agreement says something.
    assert len({skips for skips, _ in counts}) > 2 and len({harm for _, harm in counts}) > 2


def test_first_and_last_step_and_longest_lag_are_respected() -> None:
    tables = tables_of([trajectory(*smooth(0, T))], LEVELS, random_weights())
    asked = []
    found = simulate(tables, 1e9, lambda _, cell: asked.append(cell) or True)
    # Whose anchors lie 4 steps apart is outside of the tables.
    assert [cell.step for cell in asked] == [1, 2, 3, 6]
    assert found.skips.tolist() == [4] and found.harmful.tolist() == [0]


def test_the_oracle_skips_as_long_as_it_does_no_harm() -> None:
    tables = tables_of([trajectory(*smooth(s, T)) for s in range(6)], LEVELS, random_weights())
    found = simulate(tables, EPSILON, oracle(tables, EPSILON))
    assert not found.harmful.any() and found.skips.any()
    assert simulate(tables, EPSILON, lambda *_: True).harmful.any()
    assert not simulate(tables, 0.0, oracle(tables, 0.0)).skips.any()


# ---- splits, counts, scales ---------------------------------------------------------------------


@pytest.mark.parametrize("alphas", [(0.5,), (0.1,), (0.05,), (0.01, 0.5), (0.37,), (0.9,)])
def test_as_many_generations_as_are_needed_leave_enough_to_calibrate_on(
    alphas: tuple[float, ...],
) -> None:
    needed = build.generations_needed(alphas)
    parts = build.split([[index] for index in range(needed)])  # type: ignore[list-item]
    used = [*parts.fit, *parts.held_out, *parts.calibrate]
    assert used == [[index] for index in range(needed)]
    assert len(parts.calibrate) >= least_generations(min(alphas))
    assert parts.fit and parts.held_out
    # Not many more than that.
    assert len(parts.calibrate) <= least_generations(min(alphas)) + 2


def test_counts_of_branches_add_up_by_generation() -> None:
    counts = Counts(np.array([5, 4, 3, 2, 1]), np.array([1, 2, 0, 2, 0]))
    one: Any = object()
    found = build.by_generation(counts, [[one, one], [one], [one, one]])
    assert (found.skips.tolist(), found.harmful.tolist()) == ([9, 3, 3], [3, 0, 2])


def losses_at(fitted: Fitted, generations: list[Any], scale: float) -> np.ndarray:
    tables = tables_of(build.flat(generations), LEVELS, fitted.weights)
    gate = below(predictions(tables, fitted.slopes, fitted.exponents), scale * EPSILON)
    counts = build.by_generation(simulate(tables, EPSILON, gate), generations)
    return harmful_share(counts.harmful, counts.skips)


@pytest.mark.parametrize("branches", [1, 2])
def test_a_scale_keeps_its_promise_on_the_generations_that_chose_it(
    branches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SCALES", build.SCALES[::8])
    vectors = (smooth(seed, T) for seed in itertools.count())
    generations = [[trajectory(*next(vectors)) for _ in range(branches)] for _ in range(21)]
    fitted = a_fitted()
    tables = tables_of(build.flat(generations), LEVELS, fitted.weights)
    fitted.slopes[:] = slopes_of(tables, fitted.exponents)
    found = build.conformal_scales(fitted, generations, (0.05, 0.2, 0.5))
    assert 0 < found[0.05] <= found[0.2] <= found[0.5]
    assert found[0.05] < found[0.5]
    worst = np.zeros(21)
    for scale in build.SCALES:
        # The loss is made to rise with the scale.
        worst = np.maximum(worst, losses_at(fitted, generations, scale))
        bound = (21 * worst.mean() + 1) / 22
        for alpha, chosen in found.items():
            assert (bound <= alpha) == (scale <= chosen), (alpha, scale)


@pytest.mark.parametrize(
    ("most", "floor", "wanted", "tried"),
    [
        (100, 40, 100, [100]),  # runs with the first scale allow it
        (90, 60, 90, [100, 80, 90]),  # the larger ones are halved from what those runs allow
        (85, 60, 80, [100, 80, 90]),
        (70, 60, 70, [100, 80, 70]),
        (65, 60, 60, [100, 80, 70]),
        (100, 99, 100, [100]),
        (99, 99, 99, [100]),  # nothing between
    ],
)
def test_a_scale_is_settled_by_runs_of_its_own(
    most: int, floor: int, wanted: int, tried: list[int]
) -> None:
    """Runs with a scale above `most` allow `floor`, others what they ran with."""
    seen: list[int] = []

    def allowed(scale: float) -> float:
        seen.append(int(np.flatnonzero(build.SCALES == scale)[0]))
        return float(build.SCALES[floor if seen[-1] > most else seen[-1]])

    assert build.settled_scale(float(build.SCALES[100]), allowed) == build.SCALES[wanted]
    assert seen == tried


def test_a_scale_is_settled_by_what_the_nearest_larger_runs_allow() -> None:
    allowed = {100: 60, 80: 75, 77: 76}
    found = build.settled_scale(
        float(build.SCALES[100]),
        lambda scale: float(build.SCALES[allowed[int(np.flatnonzero(build.SCALES == scale)[0])]]),
    )
    assert found == build.SCALES[76]


def test_a_scale_of_0_is_settled_without_a_run() -> None:
    assert build.settled_scale(0.0, lambda scale: pytest.fail("nothing to run")) == 0.0
    # What nothing allows is 0, too.
    assert build.settled_scale(float(build.SCALES[1]), lambda scale: 0.0) == 0.0


def test_too_few_generations_for_alpha_are_refused() -> None:
    generations = [[trajectory(*smooth(seed, T))] for seed in range(4)]
    with pytest.raises(ValueError, match="20"):
        build.conformal_scales(a_fitted(), generations, (0.05,))


def test_fitting_uses_the_first_two_parts_and_never_the_third() -> None:
    """Corrections are fitted on the first and kept by the second; predictions are those of both."""
    parts = build.split([[trajectory(*smooth(seed, T))] for seed in range(20)])
    fitted = build.fit(parts, LEVELS, LAGS, EPSILON, {"model": "a"})
    assert fitted.metadata == {"model": "a", "cache_ratio_threshold": EPSILON}
    train, test = build.flat(parts.fit), build.flat(parts.held_out)
    weights = fit_weights(train, test, LEVELS, LAGS)
    assert weights.any()
    tables = tables_of([*train, *test], LEVELS, weights)
    wanted = {"weights": weights, "noise_levels": LEVELS}
    exponents = exponents_of(tables)
    slopes = slopes_of(tables, exponents)
    wanted |= {"exponents": exponents, "slopes": slopes, "degrees": degrees_of(tables, exponents)}
    wanted |= {"upper": upper_of(tables, slopes, exponents)}
    for name, table in wanted.items():
        np.testing.assert_array_equal(getattr(fitted, name), table, name)
    assert (fitted.scales, fitted.masks) == ({}, {})
    plain = build.without_corrections(fitted, parts)
    assert not plain.weights.any()
    tables = tables_of([*train, *test], LEVELS, plain.weights)
    assert plain.exponents == exponents_of(tables) != fitted.exponents
    np.testing.assert_array_equal(plain.slopes, slopes_of(tables, plain.exponents))


def test_an_audit_counts_what_records_say() -> None:
    rng = np.random.default_rng(0)
    generations = []
    for seed in range(6):
        skipped = rng.random(T) < 0.5
        errors = np.where(skipped, rng.uniform(0, 2 * EPSILON, T), 0.0)
        generations.append([trajectory(*smooth(seed, T), skipped=skipped, errors=errors)])
    found = build.audit(a_fitted(), generations, EPSILON)
    shares = [
        (t.errors >= EPSILON).sum() / max(t.skipped.sum(), 1) for t in build.flat(generations)
    ]
    assert found["false_skip_rate"] == pytest.approx(np.mean(shares))
    skips = sum(int(t.skipped.sum()) for t in build.flat(generations))
    assert (found["skips"], found["generations"]) == (skips, 6)
    assert found["hit_ratio"] == pytest.approx(skips / (6 * T))
    assert found["oracle"]["false_skip_rate"] == 0
    low, high = found["false_skip_interval"]
    assert low <= found["false_skip_rate"] <= high
    worst = max(float(t.errors.max()) for t in build.flat(generations))
    assert found["error_quantiles"]["stack"]["100"] == pytest.approx(worst)

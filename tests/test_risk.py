"""The statistics of calibration: answers known by hand, and the guarantee by simulation. Pure CPU.

The simulations are seeded, and allow three standard errors or more.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import chi2

from xfuser_fastcache.calibration.risk import (
    chi2_factor,
    conformal_scale,
    degrees_of_freedom,
    least_generations,
)
from xfuser_fastcache.reports.false_skips import false_skip_interval, false_skip_rate, harmful_share

OUT_OF_RANGE = [0.0, 1.0, -0.1, 1.5, math.nan]


# least_generations


@pytest.mark.parametrize(
    ("alpha", "needed"), [(0.05, 20), (0.01, 100), (0.1, 10), (0.3, 4), (0.07, 15), (0.999, 2)]
)
def test_least_generations(alpha: float, needed: int) -> None:
    assert least_generations(alpha) == needed


def test_least_generations_is_not_led_astray_by_rounding() -> None:
    assert [least_generations(1 / count) for count in range(2, 2000)] == list(range(2, 2000))
    assert least_generations(0.1 + 0.2 - 0.25) == 20  # 0.05 and a trace
    assert least_generations(1 / 20.001) == 21


@pytest.mark.parametrize("alpha", OUT_OF_RANGE)
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        least_generations(alpha)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        chi2_factor(10.0, alpha)


# conformal_scale


def stairs(sums: list[float], generations: int) -> np.ndarray:
    """Return losses of shape (generations, scales) whose columns have these sums."""
    return np.tile(np.array(sums) / generations, (generations, 1))


def test_conformal_scale_by_hand() -> None:
    # 39 generations at alpha 0.1: a scale is allowed where the sum of losses + 1 <= 0.1 * 40.
    scales = [0.5, 1.0, 1.5, 2.0]
    assert conformal_scale(stairs([0, 1, 2.9, 3.1], 39), scales, 0.1) == 1.5
    assert conformal_scale(stairs([0, 3.1, 3.2, 9], 39), scales, 0.1) == 0.5
    assert conformal_scale(stairs([0, 0, 0, 0], 39), scales, 0.1) == 2.0
    assert conformal_scale(stairs([3.1, 4, 5, 6], 39), scales, 0.1) == 0.0


def test_conformal_scale_meets_the_bound_exactly() -> None:
    # The sum of tenths is 3, and rounding puts it above: still allowed.
    losses = np.zeros((39, 2))
    losses[:30, 1] = 0.1
    assert losses.sum(axis=0)[1] > 3
    assert conformal_scale(losses, [1.0, 2.0], 0.1) == 2.0
    losses[30, 1] = 1e-6
    assert conformal_scale(losses, [1.0, 2.0], 0.1) == 1.0


def test_a_loss_that_falls_again_is_not_forgotten() -> None:
    # Every first skip is harmful, and 99 harmless ones beside it dilute it at the larger scale.
    losses = np.tile([1.0, 0.01], (100, 1))
    assert conformal_scale(losses, [1.0, 2.0], 0.05) == 0.0
    # The maximum is taken within each generation: of their mean it would be 0.04 here, not 0.08.
    losses = np.zeros((100, 2))
    losses[:4, 0] = 1.0
    losses[4:8, 1] = 1.0
    assert conformal_scale(losses, [1.0, 2.0], 0.05) == 1.0


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 20), (0.01, 100)])
def test_too_few_generations_are_refused(alpha: float, needed: int) -> None:
    with pytest.raises(ValueError, match=rf"{needed - 1} generations .* at least {needed}"):
        conformal_scale(np.zeros((needed - 1, 1)), [1.0], alpha)
    assert conformal_scale(np.zeros((needed, 1)), [1.0], alpha) == 1.0


@pytest.mark.parametrize(
    ("losses", "scales", "reason"),
    [
        (np.zeros(20), [1.0], "shapes"),
        (np.zeros((20, 2)), [1.0], "shapes"),
        (np.zeros((20, 1)), 1.0, "shapes"),
        (np.zeros((20, 0)), [], "shapes"),
        (np.full((20, 1), 1.1), [1.0], r"\[0, 1\]"),
        (np.full((20, 1), -0.1), [1.0], r"\[0, 1\]"),
        (np.full((20, 1), np.nan), [1.0], r"\[0, 1\]"),
        (np.zeros((20, 2)), [1.0, 1.0], "ascending"),
        (np.zeros((20, 2)), [2.0, 1.0], "ascending"),
        (np.zeros((20, 2)), [0.0, 1.0], "above 0"),
        (np.zeros((20, 2)), [1.0, np.inf], "finite"),
        (np.zeros((20, 2)), [np.nan, 1.0], "finite"),
    ],
)
def test_wrong_losses_and_scales_are_refused(
    losses: np.ndarray, scales: list[float], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        conformal_scale(losses, scales, 0.05)


def test_expected_loss_is_at_most_alpha_where_the_naive_choice_exceeds_it() -> None:
    """A generation is harmed above its own uniform limit: a scale's expected loss is the scale."""
    rng = np.random.default_rng(0)
    alpha, generations, scales = 0.05, 20, np.linspace(0.001, 1.0, 1000)
    chosen, naive = [], []
    for _ in range(4000):
        losses = (scales > rng.uniform(size=(generations, 1))).astype(float)
        chosen.append(conformal_scale(losses, scales, alpha))
        naive.append(scales[losses.mean(axis=0) <= alpha][-1])
    # The least of 20 uniform limits is 1/21 on average, the second 2/21; the grid rounds down.
    error = np.std(chosen) / 4000**0.5
    assert np.mean(chosen) == pytest.approx(1 / 21, abs=3 * error + 0.001)
    assert np.mean(chosen) <= alpha + 3 * error
    assert np.mean(naive) == pytest.approx(2 / 21, abs=3 * np.std(naive) / 4000**0.5 + 0.001)
    assert np.mean(naive) - 5 * np.std(naive) / 4000**0.5 > alpha


def test_expected_share_of_harmful_skips_is_at_most_alpha() -> None:
    """The loss in use, which is not monotone: harmful skips / skips, on 50 new generations each.

    10 steps a generation; a step is skipped where its statistic, around 1, is below the scale, and
    harmful where its hidden error, that statistic times a factor of the generation, exceeds 1.
    """
    rng = np.random.default_rng(1)
    alpha, scales, rates, falls = 0.1, np.linspace(0.05, 2.0, 80), [], False
    for _ in range(400):
        statistic = rng.uniform(0.5, 1.5, size=(70, 10))
        factor = np.exp(0.3 * rng.standard_normal((70, 1)))
        harmful = statistic * factor * np.exp(0.2 * rng.standard_normal((70, 10))) > 1
        flags = statistic[..., None] < scales
        losses = harmful_share((flags & harmful[..., None]).sum(axis=1), flags.sum(axis=1))
        falls = falls or bool((np.diff(losses) < 0).any())
        skipped = statistic[20:] < conformal_scale(losses[:20], scales, alpha)
        rates.append(false_skip_rate((skipped & harmful[20:]).sum(axis=1), skipped.sum(axis=1)))
    assert falls, "these losses are to be non-monotone"
    assert 0 < np.mean(rates) <= alpha + 3 * np.std(rates) / 400**0.5


# degrees_of_freedom


def test_degrees_of_freedom_by_hand() -> None:
    # Mean 2, unbiased variance 1.
    assert degrees_of_freedom([1, 2, 3]) == pytest.approx(8)
    assert degrees_of_freedom([0, 0, 0, 12]) == 1.0  # 2 * 9 / 36, raised to 1


@pytest.mark.parametrize("known", [3.0, 40.0, 700.0])
def test_moment_matching_recovers_known_degrees(known: float) -> None:
    rng = np.random.default_rng(2)
    found = degrees_of_freedom(1e-9 * rng.chisquare(known, size=40_000))
    assert found == pytest.approx(known, rel=0.05)


def test_moment_matching_sees_what_is_correlated() -> None:
    """16 tokens that change alike in one direction have 1 degree of freedom, not 16."""
    rng = np.random.default_rng(3)
    together = 16 * rng.standard_normal(20_000) ** 2
    apart = (rng.standard_normal((20_000, 16)) ** 2).sum(axis=1)
    assert degrees_of_freedom(together) == pytest.approx(1, rel=0.1)
    assert degrees_of_freedom(apart) == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("unit", [1.0, 0.1, 1e-200, 1e200])
def test_degrees_do_not_depend_on_the_unit(unit: float) -> None:
    assert degrees_of_freedom(unit * np.array([1.0, 2.0, 3.0])) == pytest.approx(8)
    assert degrees_of_freedom([0.1 * unit] * 7) == math.inf
    assert degrees_of_freedom([0.0, 0.0]) == math.inf


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([1.0], "at least 2"),
        ([], "at least 2"),
        ([[1.0, 2.0]], "at least 2"),
        ([1.0, -1.0], "not negative"),
        ([1.0, math.nan], "finite"),
        ([1.0, math.inf], "finite"),
    ],
)
def test_wrong_changes_are_refused(changes: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        degrees_of_freedom(changes)


# chi2_factor


@pytest.mark.parametrize(
    ("degrees", "alpha", "quantile"),
    # Lower quantiles from printed tables of the chi-square distribution.
    [(1, 0.05, 0.00393), (10, 0.05, 3.940), (10, 0.01, 2.558), (100, 0.05, 77.93)],
)
def test_chi2_factor_is_the_lower_quantile(degrees: float, alpha: float, quantile: float) -> None:
    assert chi2_factor(degrees, alpha) == pytest.approx(quantile / degrees, rel=1e-3)


def test_chi2_factor_grows_towards_one() -> None:
    factors = [chi2_factor(10.0**power, 0.05) for power in range(0, 30, 3)]
    assert factors == sorted(factors)
    assert factors[-1] == pytest.approx(1) and chi2_factor(math.inf, 0.05) == 1.0
    assert chi2_factor(64, 0.01) < chi2_factor(64, 0.05)


def test_chi2_factor_keeps_its_level() -> None:
    assert chi2.cdf(17.5 * chi2_factor(17.5, 0.03), 17.5) == pytest.approx(0.03)


@pytest.mark.parametrize("degrees", [0.0, -1.0, math.nan])
def test_degrees_out_of_range_are_refused(degrees: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        chi2_factor(degrees, 0.05)


# harmful_share, false_skip_rate, false_skip_interval


def test_rate_is_a_mean_of_generations_not_of_skips() -> None:
    # 1/1, 0/99 and no skip at all: a third, not 1 of 100 and not a half.
    assert false_skip_rate([1, 0, 0], [1, 99, 0]) == pytest.approx(1 / 3)


def test_shares_keep_their_shape() -> None:
    shares = harmful_share([[1, 2], [0, 0]], [[2, 2], [5, 0]])
    np.testing.assert_array_equal(shares, [[0.5, 1.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("harmful", "skips", "reason"),
    [
        ([1, 0], [1], "one shape"),
        ([2], [1], "harmful <= skips"),
        ([-1], [1], "0 <= harmful"),
        ([math.nan], [1], "finite"),
        ([1], [math.inf], "finite"),
        ([], [], "at least one"),
        ([[1]], [[1]], "at least one"),
    ],
)
def test_wrong_counts_are_refused(harmful: list[float], skips: list[float], reason: str) -> None:
    for function in (false_skip_rate, false_skip_interval):
        with pytest.raises(ValueError, match=reason):
            function(harmful, skips)


def test_interval_resamples_generations() -> None:
    """10 generations of 1000 skips: 5 all harmful, 5 not. Resampling skips would give 0.49-0.51."""
    harmful = [1000] * 5 + [0] * 5
    interval = false_skip_interval(harmful, [1000] * 10)
    assert interval is not None
    # Of 10 draws, 2.5 % hold at most 1 or 2 harmful ones (binomial: 0.0107 and 0.0547).
    assert interval.low == pytest.approx(0.2) and interval.high == pytest.approx(0.8)


def test_interval_is_that_of_a_mean() -> None:
    rng = np.random.default_rng(4)
    harmful = rng.binomial(50, rng.beta(2, 18, size=500))
    interval = false_skip_interval(harmful, np.full(500, 50))
    rate = false_skip_rate(harmful, np.full(500, 50))
    half = 1.96 * np.std(harmful / 50) / 500**0.5
    assert interval == pytest.approx((rate - half, rate + half), rel=0.03)


def test_interval_covers_the_true_rate() -> None:
    """95 % intervals of 64 generations, whose rates are 0 or spread around 0.1, 300 times over."""
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        chance = np.where(rng.uniform(size=64) < 0.5, 0.0, rng.beta(2, 8, size=64))
        interval = false_skip_interval(rng.binomial(14, chance), np.full(64, 14))
        assert interval is not None
        covered += interval.low <= 0.1 <= interval.high
    assert 0.90 <= covered / 300 <= 0.99


def test_interval_repeats_with_its_seed() -> None:
    harmful, skips = list(range(17)), [17] * 17
    assert false_skip_interval(harmful, skips) == false_skip_interval(harmful, skips, seed=0)
    assert false_skip_interval(harmful, skips) != false_skip_interval(harmful, skips, seed=1)


def test_interval_without_harm_is_not_empty() -> None:
    for generations in (2, 64):
        # Fewer skips, or none in some generations, change nothing: generations count.
        interval = false_skip_interval([0] * generations, [7, *[0] * (generations - 1)])
        assert interval is not None and interval.low == 0.0
        # Seeing no harm in any generation has then a probability of 5 %.
        assert (1 - interval.high) ** generations == pytest.approx(0.05)


def test_interval_of_equal_rates_and_of_one_generation() -> None:
    assert false_skip_interval([1, 2, 3], [10, 20, 30]) == pytest.approx((0.1, 0.1))
    assert false_skip_interval([4, 2, 5], [4, 2, 5]) == pytest.approx((1.0, 1.0))
    assert false_skip_interval([1], [4]) is None
    assert false_skip_interval([0], [4]) is None

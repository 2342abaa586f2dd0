"""The chi-square gate: SciPy's quantiles, the direction of alpha, and what never skips."""

from __future__ import annotations

import math

import pytest
from scipy.stats import chi2

from xfuser_fastcache import CacheConfig
from xfuser_fastcache.backends import gate_of
from xfuser_fastcache.gates.base import Evidence
from xfuser_fastcache.gates.chi_square import MAX_DEGREES_OF_FREEDOM, ChiSquareGate

TOKENS, DIM = 4096, 3072
BELOW, ABOVE = 1 - 1e-9, 1 + 1e-9


def evidence(
    ratio: float,
    degrees: float = 30.0,
    reference: float = 1e6,
    tokens: int = TOKENS,
    lag: int = 1,
) -> Evidence:
    """Return evidence of the squared relative change `ratio`, spread over so many tokens."""
    change = ratio * reference
    return exactly(change, change**2 / degrees, reference, tokens, lag=lag)


def exactly(
    change: float,
    change_squared: float,
    reference: float,
    tokens: int,
    dim: int = DIM,
    lag: int = 1,
) -> Evidence:
    """Return evidence of these sums, for a step `lag` steps after its anchor."""
    levels = (0.9 - 0.1 * lag, 0.9, None)
    return Evidence(change, change_squared, reference, tokens, dim, lag, levels)


def critical_ratio(
    gate: ChiSquareGate, degrees: float = 30.0, tokens: int = TOKENS, lag: int = 1
) -> float:
    """Return, by bisection, the squared relative change at which the gate stops skipping."""
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        skips = gate.judge(evidence(middle, degrees, tokens=tokens, lag=lag)).may_skip
        low, high = (middle, high) if skips else (low, middle)
    return low


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("degrees", [1.0, 2.5, 17.0, 63.9])
def test_chi2_skips_below_the_lower_quantile(epsilon: float, alpha: float, degrees: float) -> None:
    gate = ChiSquareGate(epsilon, alpha)
    limit = epsilon**2 * chi2.ppf(alpha, degrees) / degrees
    assert gate.judge(evidence(limit * BELOW, degrees)).may_skip
    assert not gate.judge(evidence(limit * ABOVE, degrees)).may_skip


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("tokens", [1, 64, TOKENS])
def test_paper_skips_below_the_upper_quantile(alpha: float, tokens: int) -> None:
    gate = ChiSquareGate(0.05, alpha, test="paper")
    limit = chi2.ppf(1 - alpha, tokens * DIM) / (tokens * DIM)
    assert gate.judge(evidence(limit * BELOW, tokens=tokens)).may_skip
    assert not gate.judge(evidence(limit * ABOVE, tokens=tokens)).may_skip


@pytest.mark.parametrize(("degrees", "counted"), [(0.2, 1.0), (5000.0, MAX_DEGREES_OF_FREEDOM)])
def test_degrees_of_freedom_are_bounded(degrees: float, counted: float) -> None:
    gate = ChiSquareGate(0.1)
    assert critical_ratio(gate, degrees) == pytest.approx(0.01 * chi2.ppf(0.05, counted) / counted)


@pytest.mark.parametrize(("test", "safer"), [("chi2", True), ("paper", False)])
def test_a_smaller_alpha_is_safer_for_chi2_and_looser_for_paper(test: str, safer: bool) -> None:
    small, large = (critical_ratio(ChiSquareGate(0.05, a, test)) for a in (0.01, 0.1))
    assert (small < large) == safer
    assert small != large


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_chi2_counts_a_change_as_often_as_it_has_been_skipped_over(lag: int) -> None:
    gate = ChiSquareGate(0.1)
    limit = 0.01 * chi2.ppf(0.05, 30.0) / 30.0 / lag**2
    assert critical_ratio(gate, lag=lag) == pytest.approx(limit)
    # What was tested is what is shown beside the threshold.
    verdict = gate.judge(evidence(limit, lag=lag))
    assert verdict.statistic == pytest.approx(verdict.threshold)


@pytest.mark.parametrize("lag", [1, 5])
def test_the_papers_rule_knows_no_age_of_the_anchor(lag: int) -> None:
    paper = ChiSquareGate(0.05, test="paper")
    assert critical_ratio(paper, lag=lag) == critical_ratio(paper)


def test_a_larger_threshold_skips_more() -> None:
    small, large = (critical_ratio(ChiSquareGate(epsilon)) for epsilon in (0.05, 0.1))
    assert large == pytest.approx(4 * small)


def test_the_papers_threshold_for_flux_at_1024_is_just_above_one() -> None:
    delta = math.sqrt(critical_ratio(ChiSquareGate(0.05, 0.05, test="paper")))
    assert delta == pytest.approx(1.00033, abs=5e-6)


@pytest.mark.parametrize("test", ["chi2", "paper"])
@pytest.mark.parametrize("alpha", [1e-6, 0.05, 1 - 1e-6])
@pytest.mark.parametrize(
    "found",
    [evidence(0.0), evidence(1e-12), exactly(0.0, 0.0, 1.0, 1, 1)],
    ids=["no change", "hardly any", "one number"],
)
def test_a_threshold_of_zero_never_skips(test: str, alpha: float, found: Evidence) -> None:
    assert not ChiSquareGate(0, alpha, test).judge(found).may_skip
    assert ChiSquareGate(0.05, alpha, test).judge(found).may_skip


@pytest.mark.parametrize("test", ["chi2", "paper"])
def test_nothing_to_compare_with_never_skips(test: str) -> None:
    assert not ChiSquareGate(0.05, test=test).judge(evidence(0.0, reference=0.0)).may_skip


def test_the_comparison_is_strict() -> None:
    quantile = chi2.ppf(0.05, 1.0)
    gate = ChiSquareGate(1.0)
    # A single token: one degree of freedom, and numbers that a float holds exactly.
    assert not gate.judge(exactly(quantile, quantile**2, 1.0, 1)).may_skip
    less = math.nextafter(quantile, 0)
    assert gate.judge(exactly(less, less**2, 1.0, 1)).may_skip


@pytest.mark.parametrize(("given", "test"), [("chi2", "chi2"), ("paper", "paper"), (None, "chi2")])
def test_the_backend_hands_its_options_to_the_gate(given: str | None, test: str) -> None:
    config = CacheConfig(cache_ratio_threshold=0.3, significance_level=0.2, test=given)
    gate = gate_of(config)
    assert critical_ratio(gate) == critical_ratio(ChiSquareGate(0.3, 0.2, test))


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown cache backend 'Fastest'; known: Fast"):
        gate_of(CacheConfig(use_cache="Fastest"))

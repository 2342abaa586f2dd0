"""What a cache does with a calibration: its thresholds, its options, its masks, its corrections.

The gate on evidence; the options that a file settles; and the tiny FLUX with hand-made files, whose
single open cell shows which step was decided by which numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from support.calibrations import even_levels, fitted_for, fitted_on
from support.flux import STEPS, Flux

from xfuser_fastcache import (
    CacheConfig,
    apply_cache_on_transformer,
    get_cache_trace,
    remove_cache,
)
from xfuser_fastcache.artifacts.calibration import Cell, Fitted, load_fitted
from xfuser_fastcache.backends import forecaster_of, gate_of
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.gates.base import Evidence
from xfuser_fastcache.gates.calibrated import CalibratedGate
from xfuser_fastcache.gates.chi_square import ChiSquareGate

LEVELS = even_levels(STEPS)
BELOW, ABOVE = 1 - 1e-9, 1 + 1e-9
HERE = Cell(step=5, lag=1, spacing=2)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def evidence(ratio: float, steps: tuple[int, int, int | None] = (5, 3, 1)) -> Evidence:
    """Return evidence of a squared relative change at a step with these anchors."""
    step, anchor, older = steps
    levels = (LEVELS[step], LEVELS[anchor], None if older is None else LEVELS[older])
    return Evidence(ratio * 7.0, 1.0, 7.0, 64, 16, step - anchor, levels)


# ---- the gate -----------------------------------------------------------------------------------


EXPONENTS = ((1.0, 0.0), (0.5, -1.5), (-0.7, 0.8))


def change_at(error: float, slope: float, exponents: tuple[float, float]) -> float:
    """Return the squared relative change that this error is predicted of, by `evidence`."""
    of_change, of_energy = exponents
    rho = math.sqrt(7.0 / (64 * 16))
    return (error / (slope * rho**of_energy)) ** (2 / of_change)


@pytest.mark.parametrize("exponents", EXPONENTS)
@pytest.mark.parametrize(("scale", "slope", "epsilon"), [(1.0, 1.0, 0.3), (0.4, 2.5, 0.05)])
def test_conformal_skips_where_the_predicted_error_is_below_lambda_times_epsilon(
    scale: float, slope: float, epsilon: float, exponents: tuple[float, float]
) -> None:
    fitted = fitted_on(LEVELS, exponents=exponents, upper=5.0, scales={0.05: scale, 0.1: 99.0})
    fitted.slopes[HERE] = slope
    gate = CalibratedGate(fitted, epsilon, "conformal", 0.05)
    below, above = (
        gate.judge(evidence(change_at(side * scale * epsilon, slope, exponents)))
        for side in (BELOW, ABOVE)
    )
    assert below.may_skip and not above.may_skip
    assert above.threshold == pytest.approx(scale * epsilon)
    assert above.statistic == pytest.approx(scale * epsilon)


@pytest.mark.parametrize("exponents", EXPONENTS)
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("degrees", [1.0, 7.5, 400.0])
def test_chi2_skips_below_the_quantile_of_the_cells_own_degrees(
    alpha: float, degrees: float, exponents: tuple[float, float]
) -> None:
    fitted = fitted_on(LEVELS, exponents=exponents, upper=1.3)
    fitted.slopes[HERE], fitted.degrees[HERE] = 2.0, degrees
    gate = CalibratedGate(fitted, 0.3, "chi2", alpha)
    limit = math.sqrt((0.3 / 1.3) ** 2 * chi2.ppf(alpha, degrees) / degrees)
    assert gate.judge(evidence(change_at(limit * BELOW, 2.0, exponents))).may_skip
    assert not gate.judge(evidence(change_at(limit * ABOVE, 2.0, exponents))).may_skip


def test_a_statistic_that_did_not_vary_leaves_the_factor_at_one() -> None:
    fitted = fitted_on(LEVELS)
    fitted.degrees[:] = math.inf
    threshold = CalibratedGate(fitted, 0.3, "chi2", 0.05).judge(evidence(0.0)).threshold
    assert threshold == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("test", ["conformal", "chi2"])
def test_a_change_of_nothing_skips_unless_errors_fall_with_the_change(test: str) -> None:
    for exponents in EXPONENTS:
        gate = CalibratedGate(fitted_on(LEVELS, exponents=exponents), 0.3, test, 0.05)
        assert gate.judge(evidence(0.0)).may_skip == (exponents[0] > 0)


@pytest.mark.parametrize("test", ["conformal", "chi2"])
@pytest.mark.parametrize(
    "steps",
    [(5, 3, 2), (5, 3, None), (5, 4, 2), (4, 2, 0), (6, 2, 1), (5, 3, 3)],
    ids=["spacing", "one anchor", "lag", "step", "lag out of reach", "no spacing"],
)
def test_only_the_cell_of_the_step_and_its_anchors_counts(
    test: str, steps: tuple[int, int, int | None]
) -> None:
    fitted = fitted_on(LEVELS)
    fitted.slopes[:] = math.inf
    fitted.slopes[HERE] = 1.0
    gate = CalibratedGate(fitted, 0.3, test, 0.05)
    assert gate.judge(evidence(1e-9)).may_skip
    # Not even where nothing has changed.
    assert not gate.judge(evidence(0.0, steps)).may_skip


@pytest.mark.parametrize("test", ["conformal", "chi2"])
def test_what_never_skips(test: str) -> None:
    fitted = fitted_on(LEVELS)
    assert not CalibratedGate(fitted, 0.0, test, 0.05).judge(evidence(0.0)).may_skip
    nothing = Evidence(0.0, 0.0, 0.0, 64, 16, 2, (LEVELS[5], LEVELS[3], LEVELS[1]))
    assert CalibratedGate(fitted, 0.3, test, 0.05).judge(nothing).statistic is None
    assert not CalibratedGate(fitted, 0.3, test, 0.05).judge(nothing).may_skip
    none_allowed = fitted_on(LEVELS, scales={0.05: 0.0})
    assert not CalibratedGate(none_allowed, 0.3, "conformal", 0.05).judge(evidence(0.0)).may_skip


@pytest.mark.parametrize(
    ("levels", "cell"),
    [
        ((5, 3, 1), HERE),
        ((5, 3, None), Cell(5, 1, 0)),
        ((1, 0, None), Cell(1, 0, 0)),
        ((7, 4, 1), Cell(7, 2, 3)),
        ((7, 3, 1), None),
        ((7, 4, 0), None),
        ((5, 3, 4), None),
        ((3, 5, 1), None),
        ((3, 3, 1), None),
    ],
)
def test_a_cell_is_found_by_noise_levels(levels: Any, cell: Cell | None) -> None:
    now, anchor, older = (None if step is None else LEVELS[step] + 4e-6 for step in levels)
    fitted = fitted_on(LEVELS, lags=3)
    assert fitted.cell(now, anchor, older) == cell
    assert fitted.cell(now + 2e-5, anchor, older) is None


# ---- what a file settles ------------------------------------------------------------------------

MASK = [1, 0, 0, 1, 0, 0, 0, 1]
FILE = fitted_on(LEVELS, lags=3, masks={3: MASK})


def test_options_left_at_their_default_take_the_files_values() -> None:
    config = CacheConfig(calibration="x", verify_consensus=True).resolved(FILE)
    assert config.to_dict() == CacheConfig(test="chi2").resolved().to_dict() | {
        "calibration": FILE.digest,
        "forecaster": "output",
        "test": "conformal",
        "num_warmup_steps": 1,
        "max_consecutive_skips": 3,
        "cache_ratio_threshold": 0.3,
        "verify_consensus": True,
    }


@pytest.mark.parametrize(
    "given",
    [
        {"cache_ratio_threshold": 0.0},
        {"num_warmup_steps": 0, "max_consecutive_skips": 2},
        {"test": "chi2", "cache_ratio_threshold": 0.2, "significance_level": 0.37},
        # These equal the defaults without a calibration, and hold all the same.
        {"num_warmup_steps": 2, "max_consecutive_skips": 4},
        {"test": "chi2", "cache_ratio_threshold": 0.05},
        {"significance_level": 0.1},
        {"steps_mask": [1] * STEPS},
    ],
    ids=lambda given: next(iter(given)),
)
def test_options_that_are_given_win(given: dict[str, Any]) -> None:
    config = CacheConfig(calibration="x", **given).resolved(FILE)
    assert config.to_dict() == CacheConfig(calibration="x").resolved(FILE).to_dict() | given


@pytest.mark.parametrize("threshold", [0.05, 0.2])
def test_another_epsilon_is_refused_also_where_it_is_the_default(threshold: float) -> None:
    config = CacheConfig(calibration="x", cache_ratio_threshold=threshold)
    with pytest.raises(ValueError, match=f"cache_ratio_threshold={threshold} is not what .*0.3"):
        config.resolved(FILE)


def test_without_its_file_a_calibrated_config_leaves_open_what_the_file_knows() -> None:
    config = CacheConfig(calibration="x", verify_consensus=True)
    assert config.resolved().resolved(FILE) == config.resolved(FILE)


def test_a_number_of_computed_steps_names_a_mask() -> None:
    assert CacheConfig(calibration="x", computed_steps=3).resolved(FILE).steps_mask == MASK


@pytest.mark.parametrize("given", [{"computed_steps": 3}, {"steps_mask": MASK}])
def test_with_a_mask_alpha_and_epsilon_need_not_be_the_files(given: dict[str, Any]) -> None:
    """The gate, which is not asked then, would never skip at an alpha that was not calibrated."""
    other = {"significance_level": 0.37, "cache_ratio_threshold": 0.2}
    config = CacheConfig(calibration="x", **given, **other).resolved(FILE)
    assert (config.steps_mask, config.significance_level) == (MASK, 0.37)
    assert not gate_of(config, FILE).judge(evidence(0.0)).may_skip


def test_files_of_other_content_give_other_config_digests(tmp_path: Path) -> None:
    def digest(name: str, **changes: Any) -> int:
        fitted_on(LEVELS, **changes).save(tmp_path / name)
        config = CacheConfig(calibration=str(tmp_path / name))
        return config.resolved(load_fitted(tmp_path / name)).digest()

    assert digest("one") == digest("same") != digest("other", scales={0.05: 0.9})


def test_the_backend_makes_gate_and_forecaster_from_the_file() -> None:
    config = CacheConfig(calibration="x").resolved(FILE)
    gate = gate_of(config, FILE)
    assert isinstance(gate, CalibratedGate) and (gate.limits == 0.3).all()
    assert isinstance(gate_of(CacheConfig()), ChiSquareGate)


@pytest.mark.parametrize(
    ("stage", "stages", "fitted"),
    [(0, 1, FILE), (0, 2, None), (1, 3, None), (1, 2, FILE)],
)
def test_of_a_pipeline_the_last_stage_alone_corrects(
    stage: int, stages: int, fitted: Fitted | None
) -> None:
    config = CacheConfig(calibration="x").resolved(FILE)
    made = forecaster_of(config, FILE, DecisionGroup(stage=stage, stages=stages))
    assert isinstance(made, OutputForecaster)
    assert made.fitted == fitted


# ---- on a tiny FLUX -----------------------------------------------------------------------------


def calibrated(flux: Flux, path: Path, fitted: Fitted, **options: Any) -> Flux:
    fitted.save(path)
    scheduler = flux.pipe.scheduler
    options = {"calibration": str(path), "scheduler": scheduler, **options}
    apply_cache_on_transformer(flux.transformer, **options)
    return flux


def wide_open(flux: Flux, **changes: Any) -> Fitted:
    """Return a calibration that allows any change in all of its cells."""
    fitted = fitted_for(flux.pipe, STEPS, **changes)
    fitted.slopes[:] = 1e-6
    return fitted


def test_all_cells_open_skips_up_to_the_longest_lag(tmp_path: Path) -> None:
    flux = Flux()
    calibrated(flux, tmp_path / "file", wide_open(flux))()
    # At step 4 the last anchor is step 0: too old. At step 7, the last one, none is skipped.
    assert flux.flags == [0, 1, 1, 1, 0, 0, 1, 0]
    reasons = [row["reason"] for row in get_cache_trace(flux.transformer)]
    # The anchors of step 5 lie 4 steps apart, which is no cell.
    assert [reasons[step] for step in (0, 4, 5, 7)] == [
        "warm-up", "anchor too old", "changed", "last step",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "skipped"),
    [
        ([Cell(3, 0, 1)], [3]),
        ([Cell(1, 0, 0), Cell(2, 1, 0)], [1, 2]),
        ([Cell(2, 1, 0)], []),
        ([Cell(3, 0, 1), Cell(5, 0, 2), Cell(6, 1, 2)], [3, 5, 6]),
        ([Cell(3, 0, 1), Cell(5, 0, 1), Cell(6, 0, 1)], [3, 6]),
    ],
)
def test_a_step_is_decided_by_its_own_cell(
    tmp_path: Path, cells: list[Cell], skipped: list[int]
) -> None:
    flux = Flux()
    fitted = fitted_for(flux.pipe, STEPS)
    fitted.slopes[:] = math.inf
    for cell in cells:
        fitted.slopes[cell] = 1e-6
    calibrated(flux, tmp_path / "file", fitted)()
    assert [step for step, flags in enumerate(flux.flags) if flags] == skipped


def test_threshold_zero_is_bit_identical_to_no_cache(tmp_path: Path) -> None:
    flux = Flux()
    wanted = flux()
    calibrated(flux, tmp_path / "file", wide_open(flux), cache_ratio_threshold=0)
    assert torch.equal(flux(), wanted)
    assert flux.flags == [0] * STEPS


@pytest.mark.parametrize("options", [{"computed_steps": 3}, {}], ids=["mask", "gate"])
def test_a_generation_repeats_and_leaves_nothing_behind(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    flux = Flux()
    uncached = flux()
    calibrated(flux, tmp_path / "file", wide_open(flux, masks={3: MASK}), **options)
    first = flux()
    assert torch.equal(flux(), first) and not torch.equal(first, uncached)
    if options:
        assert flux.flags == [1 - computed for computed in MASK]
    remove_cache(flux.transformer)
    assert torch.equal(flux(), uncached)


def test_a_skipped_steps_output_has_the_files_correction(tmp_path: Path) -> None:
    """Weights in one cell alone change the output of one step alone, by what they say."""
    mask, cell = [1, 0, 1, 0, 1, 1, 1, 1], Cell(3, 0, 2)
    outputs: dict[bool, list[torch.Tensor]] = {}
    for corrects in (False, True):
        flux = Flux()
        fitted = wide_open(flux)
        fitted.weights[cell] = (0.0, 0.0, 0.25, 0.0) if corrects else 0.0
        calibrated(flux, tmp_path / "file", fitted, steps_mask=mask)
        seen = outputs[corrects] = []
        flux.transformer.register_forward_hook(lambda *_, seen=seen: seen.append(_[2][0]))
        flux()
    plain, corrected = outputs[False], outputs[True]
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], corrected[:3], strict=True))
    torch.testing.assert_close(corrected[3], plain[3] + 0.25 * plain[2])
    assert not np.array_equal(plain[4], corrected[4])

"""scripts/simulate_tests.py: it draws what it says, and shows what it is quoted for. Pure CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scripts.dev import simulate_tests
from scripts.dev.simulate_tests import (
    DIM,
    EPSILON,
    STEPS,
    TOKENS,
    WORLDS,
    Generations,
    Row,
    World,
    draw,
)

ALPHA = 0.05
Rows = dict[tuple[str, str], Row]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the simulation small, by its command line."""
    path = tmp_path_factory.mktemp("simulation") / "simulation.json"
    simulate_tests.main(["--repetitions", "12", "--seed", "7", "--json", str(path)])
    return path


@pytest.fixture(scope="module")
def rows(report: Path) -> Rows:
    found = [Row(**row) for row in json.loads(report.read_text(encoding="utf-8"))["rows"]]
    assert {row.world for row in found} == set(WORLDS)
    return {(row.world, row.test): row for row in found}


@pytest.mark.parametrize("world", WORLDS)
def test_literal_test_skips_everything_harmful_or_not(rows: Rows, world: str) -> None:
    paper = rows[world, "paper"]
    assert paper.skipped > 0.999
    assert paper.false_skip_low > 10 * ALPHA


@pytest.mark.parametrize("world", WORLDS)
def test_conformal_keeps_alpha_and_skips(rows: Rows, world: str) -> None:
    conformal, oracle = rows[world, "conformal, twice"], rows[world, "oracle"]
    assert conformal.false_skip_low <= ALPHA
    assert conformal.false_skip_rate <= ALPHA + 0.01
    assert conformal.skipped > 0.03
    assert oracle.false_skip_rate == 0
    if world == "many dimensions":  # where the change can be seen exactly, and tells the harm
        assert conformal.skipped > 0.95 * oracle.skipped


def test_once_is_enough_only_where_states_do_not_react(rows: Rows) -> None:
    for world in WORLDS:
        once, twice = rows[world, "conformal, once"], rows[world, "conformal, twice"]
        if WORLDS[world].reaction:
            assert once.false_skip_low > 4 * ALPHA and twice.skipped < once.skipped
        else:
            assert once == Row(**{**vars(twice), "test": once.test})


def test_chi2_holds_where_its_model_does(rows: Rows) -> None:
    for world in ("many dimensions", "few dimensions"):
        matched = rows[world, "chi2, moment matched"]
        assert matched.false_skip_rate <= ALPHA and matched.skipped > 0.05


def test_chi2_fails_where_its_model_does(rows: Rows) -> None:
    assert rows["few dimensions", "chi2, not calibrated"].false_skip_low > 2 * ALPHA
    assert rows["random slope", "chi2, not calibrated"].false_skip_low > ALPHA
    assert rows["random slope", "chi2, moment matched"].false_skip_low > ALPHA
    assert rows["states react", "chi2, calibrated"].false_skip_low > ALPHA


def test_calibrated_slope_makes_chi2_skip_less(rows: Rows) -> None:
    for world in WORLDS:
        plain, fitted = rows[world, "chi2, moment matched"], rows[world, "chi2, calibrated"]
        assert 0 < fitted.skipped < plain.skipped


@pytest.mark.parametrize(
    "world", [WORLDS["many dimensions"], WORLDS["few dimensions"], World(patches=16, directions=3)]
)
def test_statistics_are_those_of_correlated_gaussian_states(world: World) -> None:
    """Q/R and the unevenness of tokens, drawn patch by patch, against states in full size."""
    rng = np.random.default_rng(0)
    drawn = draw(replace(world, slope_spread=0.0), 400, rng)
    noise = drawn.ratio / drawn.error**2  # of slope 1, the error is the change

    axes = np.linalg.qr(rng.standard_normal((DIM, world.directions)))[0]
    patches = rng.standard_normal((200, world.patches, world.directions)) @ axes.T
    tokens = patches.repeat(TOKENS // world.patches, axis=1)
    per_token = (tokens**2).sum(axis=2)
    q = per_token.sum(axis=1)
    unevenness = (per_token**2).sum(axis=1) / q**2

    assert tokens.shape[1:] == (TOKENS, DIM)
    degrees = world.patches * world.directions
    assert noise.mean() == pytest.approx(1, abs=0.02)
    assert 2 / noise.var() == pytest.approx(degrees, rel=0.05)
    assert 2 * q.mean() ** 2 / q.var() == pytest.approx(degrees, rel=0.35)
    assert drawn.unevenness.mean() == pytest.approx(unevenness.mean(), rel=0.03)


def test_generations_differ_and_are_the_unit() -> None:
    """Slopes and levels belong to a generation: its steps share them, generations do not."""
    drawn = draw(WORLDS["random slope"], 2000, np.random.default_rng(0))
    levels = np.log(drawn.error / EPSILON / simulate_tests.MEDIANS)
    within, between = levels.std(axis=1, ddof=1), levels.mean(axis=1)
    assert np.median(within) == pytest.approx(0.05, rel=0.05)
    # The median absolute value of Student's t of 3 degrees is 0.765; 0.1 a adds little.
    assert np.median(np.abs(between)) == pytest.approx(0.3 * 0.765, rel=0.15)


def test_harm_grows_with_the_steps_skipped_in_a_row() -> None:
    error = np.full((1, STEPS), 0.95 * EPSILON)
    quiet = Generations(error, error, error, reaction=0.1)
    skipped = np.zeros((1, STEPS), dtype=bool)
    assert not quiet.harm(skipped).any()
    skipped[0, [1, 2, 3, 6]] = True
    # Harmful, if skipped, right after a skip: 0.95 * 1.1 > 1.
    assert np.flatnonzero(quiet.harm(skipped)[0]).tolist() == [2, 3, 4, 7]
    assert np.flatnonzero(quiet.harmless()[0]).tolist() == list(range(0, STEPS, 2))
    assert not Generations(error, error, error, reaction=0.0).harm(skipped).any()


def test_same_seed_same_rows_other_seed_other_rows() -> None:
    small = ["--repetitions", "2", "--check", "5", "--calibrate", "20", "--fit", "5"]
    first, again, other = (
        simulate_tests.simulate(simulate_tests.parse([*small, "--seed", seed]))
        for seed in ("1", "1", "2")
    )
    assert first == again != other


def test_json_holds_the_options(report: Path) -> None:
    options = json.loads(report.read_text(encoding="utf-8"))["options"]
    assert options["seed"] == 7 and options["alpha"] == ALPHA and options["calibrate"] == 100


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--calibrate", "19"], "needs at least 20"),
        (["--alpha", "0"], "between 0 and 1"),
        (["--repetitions", "1"], "at least 2"),
    ],
)
def test_wrong_flags_are_refused(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        simulate_tests.main(flags)
    assert reason in capsys.readouterr().err

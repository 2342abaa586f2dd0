"""scripts/dev/scale.py: the simulated world against closed forms, and a measured one of two ranks.

Layers: one process; `gloo` (two forked ranks).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from scripts.dev import _fabric, scale
from scripts.dev._fabric import PROTOCOLS, Link, Steps, World, last_arrival, waits

NO_TIME, NEAR, FAR = Link(1e-9, 1e-9), Link(10.0, 10.0), Link(30.0, 30.0)
PUNCTUAL: dict[str, Any] = {"jitter": 0.0, "straggles": 0.0, "handled": 0.0}


def wait_of(name: str, world: World, rounds: int = 20, seed: int = 3) -> float:
    start = world.arrivals(rounds, np.random.default_rng(seed))
    return float((PROTOCOLS[name](world, start, np.random.default_rng(seed)) - start).mean())


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_without_wires_all_wait_for_the_last_rank_alone(name: str, ranks: int) -> None:
    """The mean of the largest of n exponential times is the harmonic number."""
    world = World(ranks, NO_TIME, NO_TIME, NO_TIME, jitter=50.0, straggles=0.0, handled=0.0)
    start = world.arrivals(4000, np.random.default_rng(0))
    known = PROTOCOLS[name](world, start, np.random.default_rng(1))
    assert np.allclose(known, start.max(axis=1, keepdims=True))
    assert known.mean() == pytest.approx(last_arrival(50.0, ranks), rel=0.03)


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("ring", 8, 14 * 10.0),
        ("tree", 8, 3 * 10.0),
        ("tree", 64, 3 * 10.0 + 3 * 30.0),
        ("direct", 8, 10.0),
        ("direct", 64, 30.0),
        ("hierarchical", 8, 10.0),
        ("hierarchical", 64, 10.0 + 30.0),
    ],
)
def test_steady_wires_take_what_the_messages_in_a_row_take(
    name: str, ranks: int, expected: float
) -> None:
    world = World(ranks, NEAR, FAR, FAR, **PUNCTUAL)
    assert wait_of(name, world) == pytest.approx(expected)


def test_a_ring_over_nodes_goes_at_the_pace_of_its_slowest_message() -> None:
    """Each rank's news crosses every wire, so all have waited for the far ones in the end."""
    world = World(16, NEAR, FAR, FAR, **PUNCTUAL)
    assert 30 * 10.0 < wait_of("ring", world) <= 30 * 30.0


def test_messages_that_a_host_handles_one_after_the_other_add_up() -> None:
    world = replace(World(64, NEAR, NEAR, NEAR, **PUNCTUAL), handled=2.0)
    # The last of 63 leaves when all are handled; as many are then taken.
    assert wait_of("direct", world) == pytest.approx(63 * 2.0 + 10.0 + 63 * 2.0)
    assert wait_of("hierarchical", world) == pytest.approx(2 * (7 * 2.0 + 10.0 + 7 * 2.0))
    assert wait_of("tree", world) == pytest.approx(6 * (10.0 + 2 * 2.0))


def test_a_link_has_its_published_quantiles() -> None:
    link = Link(108.0, 630.0)
    times = link.draw(np.random.default_rng(0).standard_normal(400_000))
    assert np.median(times) == pytest.approx(108.0, rel=0.01)
    assert np.quantile(times, 0.99) == pytest.approx(630.0, rel=0.02)
    assert times.mean() == pytest.approx(link.mean, rel=0.01)


def test_a_lagged_vector_is_waited_for_where_its_round_outlasts_a_step() -> None:
    world = World(8, NEAR, FAR, FAR, **PUNCTUAL)  # the ring takes 140 us
    assert waits(world, 5, seed=0, step=139.0)["lagged, ring"] == pytest.approx(1.0)
    assert waits(world, 5, seed=0, step=141.0)["lagged, ring"] == 0.0
    assert waits(world, 5, seed=0, step=11.0)["lagged, direct"] == 0.0


def test_stragglers_are_as_many_and_as_late_as_said() -> None:
    world = World(64, NEAR, NEAR, NEAR, jitter=0.0, straggles=0.01, late=700.0)
    late = world.arrivals(2000, np.random.default_rng(0))
    assert set(np.unique(late)) == {0.0, 700.0}
    assert (late > 0).mean() == pytest.approx(0.01, rel=0.1)


def test_a_seed_repeats_all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "RANKS", (2, 16))
    runs = [scale.simulate(scale.FLUX, 10, seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert set(runs[0][0]) >= {*PROTOCOLS, *(f"lagged, {name}" for name in _fabric.CARRIED)}


def test_a_step_goes_through_both_published_times() -> None:
    steps = Steps.through(240.0, 90.0, 4, skipped=2.0)
    assert (steps.computed(1), steps.computed(4)) == (240.0, 90.0)
    assert steps.computed(2) == pytest.approx(140.0)
    # Half of the steps skipped: (240 / 2 + 2 / 2 + 3) of 240.
    assert steps.gain(1, 0.5, agreeing=3.0) == pytest.approx(240.0 / 124.0)


@pytest.mark.gloo
def test_two_ranks_are_measured_in_every_mode() -> None:
    found = scale.measure(2, rounds=3, repeats=1)
    assert set(found["modes"]) == set(scale.MODES)
    for parts in found["modes"].values():
        assert parts["wait_us"] > 0 and parts["post_us"] > 0 and parts["busy_us"] > 0
    # Header, and the moments of one span.
    assert found["vector_bytes"] == 8 * (scale.HEADER + scale.SLOTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --measure RANKS..., --simulate, or both"),
        (["--measure", "1"], "--measure 1: give at least 2 ranks"),
        (["--simulate", "--rounds", "0"], "--rounds 0: give at least 1"),
    ],
)
def test_a_wrong_flag_is_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        scale.main(flags)
    assert message in capsys.readouterr().err

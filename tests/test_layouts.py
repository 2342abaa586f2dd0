"""Every layout of xDiT on the toy FLUX, as real processes: uncached control first, then cached.

One spawned world per layout runs all cases (`toy_worker.py`); the tests read its report. All but
two worlds are slow (`pytest -m slow tests/test_layouts.py`); the matrix has them all, of tiny
models.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.toy import MASK, STEPS, THRESHOLD
from support.worlds import run_world

LAYOUTS = {
    "1 rank": (1, ()),
    "ulysses 2": (2, ("--ulysses_degree=2",)),
    "ring 2": (2, ("--ring_degree=2",)),
    "pipefusion 2": (2, ("--pipefusion_parallel_degree=2", "--num_pipeline_patch=2")),
    "ulysses 2 x ring 2": (4, ("--ulysses_degree=2", "--ring_degree=2")),
    "pipefusion 2 x ulysses 2": (
        4,
        ("--pipefusion_parallel_degree=2", "--num_pipeline_patch=2", "--ulysses_degree=2"),
    ),
    "data 2": (2, ("--data_parallel_degree=2",)),
}

QUICK = ("1 rank", "pipefusion 2")

pytestmark = pytest.mark.gloo


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS
    ],
)
def world(request: pytest.FixtureRequest) -> dict[int, dict[str, Any]]:
    ranks, flags = LAYOUTS[request.param]
    return run_world("toy_worker.py", ranks, *flags, timeout_s=280)


def everywhere(world: dict[int, dict[str, Any]], key: str) -> list[Any]:
    return [report[key] for report in world.values()]


def outputs(world: dict[int, dict[str, Any]], key: str) -> list[Any]:
    """What the ranks that hold pictures say."""
    found = [report[key] for report in world.values() if report["has_output"]]
    assert found
    return found


def groups(world: dict[int, dict[str, Any]]) -> set[tuple[int, ...]]:
    return {tuple(report["group"]) for report in world.values()}


def test_the_uncached_control_runs_and_repeats(world: dict[int, dict[str, Any]]) -> None:
    assert all(everywhere(world, "uncached_repeats"))


def test_threshold_0_is_uncached_to_the_bit(world: dict[int, dict[str, Any]]) -> None:
    assert all(everywhere(world, "threshold_0_exact"))
    assert set(everywhere(world, "threshold_0_hits")) == {0.0}


def test_removal_restores_the_model(world: dict[int, dict[str, Any]]) -> None:
    assert everywhere(world, "left_behind") == [[]] * len(world)
    assert all(everywhere(world, "restored_exact"))
    assert all(everywhere(world, "state_dict_unchanged"))


def test_all_ranks_of_a_group_decide_alike(world: dict[int, dict[str, Any]]) -> None:
    for group in groups(world):
        for key in ("reuse_digest", "linear_digest", "output_digest", "calibrated_digest"):
            assert len({world[rank][key] for rank in group}) == 1
        statistics = [world[rank]["statistics"] for rank in group]
        assert len({s["decisions_digest"] for s in statistics}) == 1
        # Blocks of all pipeline stages, under the names of the unsplit model, on every rank.
        assert len({repr(s["blocks"]) for s in statistics}) == 1
        assert len(statistics[0]["blocks"]) == 12


def test_one_collective_a_step(world: dict[int, dict[str, Any]]) -> None:
    for statistics in everywhere(world, "first_statistics"):
        assert statistics["steps"] == statistics["collectives"] == STEPS
    assert {s["collectives_per_step"] for s in everywhere(world, "statistics")} == {1.0}


def test_the_cache_skips_and_changes_the_output_a_little(world: dict[int, dict[str, Any]]) -> None:
    assert THRESHOLD > 0
    assert all(s["block_approx_ratio"] >= 0.4 for s in everywhere(world, "first_statistics"))
    assert all(outputs(world, "changed"))
    for key in ("psnr", "reuse_psnr", "linear_psnr", "output_psnr"):
        assert all(30 < psnr < 90 for psnr in outputs(world, key))
    assert all(hits >= 0.4 for hits in everywhere(world, "linear_hits"))


def test_the_second_generation_repeats_the_first(world: dict[int, dict[str, Any]]) -> None:
    repeats = ("reuse_repeats", "linear_repeats", "output_repeats", "calibrated_repeats")
    for key in ("second_generation_exact", "back_again_exact", *repeats):
        assert all(everywhere(world, key)), key


def test_a_calibration_of_one_rank_serves_every_layout(world: dict[int, dict[str, Any]]) -> None:
    share = MASK.count(0) / STEPS
    assert everywhere(world, "calibrated_hits") == pytest.approx([share] * len(world))
    assert all(30 < psnr < 90 for psnr in outputs(world, "calibrated_psnr"))


def test_staggered_stages_decide_alike_and_repeat(world: dict[int, dict[str, Any]]) -> None:
    assert all(everywhere(world, "staggered_repeats"))
    for group in groups(world):
        assert len({world[rank]["staggered_digest"] for rank in group}) == 1
    assert all(psnr > 30 for psnr in outputs(world, "staggered_psnr"))
    # It changes something where there is a pipeline, and nothing elsewhere.
    in_pipeline = any(report["stages"] > 1 for report in world.values())
    assert set(outputs(world, "staggered_as_before")) == {not in_pipeline}


def test_keys_of_other_patches_that_are_carried_on_are_nearer_than_aged_ones(
    world: dict[int, dict[str, Any]],
) -> None:
    in_pipeline = any(report["stages"] > 1 for report in world.values())
    carried = [s["carried_keys"] for s in everywhere(world, "first_statistics")]
    assert all(carried) if in_pipeline else not any(carried)
    if in_pipeline:
        assert not any(everywhere(world, "aged_carried"))
        (aged,), (carried_on,) = (set(outputs(world, key)) for key in ("aged_psnr", "psnr"))
        assert carried_on > aged + 0.4


def test_the_last_stage_forecasts_from_the_latents_as_one_rank_does() -> None:
    """With one patch no key is old, so that nothing but the forecasts could differ."""
    stages = ("--pipefusion_parallel_degree=2", "--num_pipeline_patch=1")
    worlds = [run_world("toy_worker.py", ranks, "--budget", *flags, timeout_s=280)
              for ranks, flags in ((1, ()), (2, stages))]  # fmt: skip
    (wanted,), (found,) = ([r["latents"] for r in w.values() if r["latents"]] for w in worlds)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert [r["left_behind"] for w in worlds for r in w.values()] == [[]] * 3


@pytest.mark.parametrize("change", ["steps", "size", "batch"])
def test_the_next_call_may_differ(world: dict[int, dict[str, Any]], change: str) -> None:
    """As if the cache had been applied just before, and close to uncached."""
    assert all(everywhere(world, f"other_{change}_exact"))
    assert all(30 < psnr < 90 for psnr in outputs(world, f"other_{change}_psnr"))

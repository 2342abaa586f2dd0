"""What goes wrong on one rank: nothing hangs for ever, nobody decides alone."""

from __future__ import annotations

from typing import Any

import pytest
from chaos_worker import BAD_STEP, TIMEOUT_S
from support.toy import STEPS
from support.worlds import WorldFailed, run_world

pytestmark = [pytest.mark.gloo, pytest.mark.chaos]


def chaos(case: str, timeout_s: float = 120) -> dict[int, dict[str, Any]]:
    world = run_world("chaos_worker.py", 2, case, timeout_s=timeout_s)
    assert all(report["removed"] for report in world.values())
    return world


def flags(report: dict[str, Any]) -> list[int]:
    return [entry[3] for entry in report["decisions"]]


@pytest.mark.slow
def test_without_consensus_a_disagreement_hangs() -> None:
    """The hazard is real: the rank that skips never enters the attention's all-to-all."""
    with pytest.raises(WorldFailed) as failed:
        chaos("uncoordinated", timeout_s=45)
    assert failed.value.timed_out


def test_with_consensus_the_same_disagreement_finishes() -> None:
    world = chaos("coordinated")
    assert [report["error"] for report in world.values()] == ["", ""]
    assert flags(world[0]) == flags(world[1])
    skipped = [step for step, skip in enumerate(flags(world[0])) if skip]
    # Rank 1 forbids odd steps and rank 0 obeys; it alone would have skipped them too.
    assert skipped
    assert all(step % 2 == 0 for step in skipped)
    digests = {report["statistics"]["decisions_digest"] for report in world.values()}
    assert len(digests) == 1


def test_a_nan_on_one_rank_makes_all_compute_at_the_next_decision() -> None:
    world = chaos("nan")
    assert flags(world[0]) == flags(world[1])
    assert flags(world[0])[BAD_STEP] == 0
    assert sum(flags(world[0])[BAD_STEP + 1 :]) > 0, "it recovers"
    for report in world.values():
        assert len(report["decisions"]) == STEPS
        assert report["statistics"]["nonfinite_steps"] == 1
        (warning,) = report["warnings"]
        assert "NaN" in warning


def test_a_rank_that_never_arrives_is_named_in_time() -> None:
    world = chaos("absent")
    assert "ConsensusTimeout" in world[0]["error"]
    assert "Did not arrive: rank 1" in world[0]["error"]
    assert f"step {BAD_STEP}, branch 0" in world[0]["error"]
    assert world[0]["seconds"] < TIMEOUT_S + 4


def test_a_wait_inside_attention_ends_and_names_who_is_missing() -> None:
    world = chaos("attention")
    assert "ConsensusTimeout" in world[0]["error"]
    assert "Did not arrive: rank 1" in world[0]["error"]
    assert "step 1, branch 0" in world[0]["error"]
    assert world[0]["seconds"] < TIMEOUT_S + 8

"""The consensus protocol over four real gloo ranks, and in a single process.

Layers: one process; `gloo` (one world of plain torch.distributed runs all cases).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from consensus_worker import EXPONENT, SHARDINGS, make, raised, round_trip
from support.worlds import run_world

from xfuser_fastcache.consensus.header import DIGEST_BITS, Header
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.gates.base import Evidence
from xfuser_fastcache.gates.chi_square import ChiSquareGate
from xfuser_fastcache.measurements.moments import CHANGE, SLOTS, TOKENS, Moments

RANKS = range(4)


@pytest.fixture(scope="module")
def world() -> dict[int, dict[str, Any]]:
    return run_world("consensus_worker.py", 4, timeout_s=150)


@pytest.mark.gloo
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_any_sharding_gives_the_same_integers_on_every_rank(
    world: dict[int, dict[str, Any]], sharding: str, dtype: str
) -> None:
    expected = world[0][dtype]["one process"]
    assert expected[CHANGE] > 0
    assert expected[TOKENS] == 2 * 13
    for rank in RANKS:
        assert world[rank][dtype][sharding] == expected


@pytest.mark.gloo
def test_nan_and_overflow_of_one_rank_reach_all(world: dict[int, dict[str, Any]]) -> None:
    nonfinite, overflow, tokens, reduced = world[0]["broken"]
    assert (nonfinite, overflow, tokens) == (1, 2, 8)
    assert all(number >= 0 for number in reduced), "clamped, not wrapped"
    assert all(world[rank]["broken"] == world[0]["broken"] for rank in RANKS)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("generation", "generation"),
        ("step", "step"),
        ("branch", "branch"),
        ("digest", "digest"),
        ("squares", "step"),
        ("setup", "setup"),
    ],
)
def test_ranks_at_different_places_all_raise_and_say_what_differs(
    world: dict[int, dict[str, Any]], case: str, names: str
) -> None:
    for rank in RANKS:
        message = world[rank]["places"][case]
        assert "are at different places" in message
        assert f"they differ in {names} (own" in message


@pytest.mark.gloo
def test_ranks_that_have_not_told_their_place_are_named(world: dict[int, dict[str, Any]]) -> None:
    untold = "ranks [2, 3] at a place that they have not told yet"
    assert [untold in world[rank]["unheard"] for rank in RANKS] == [True, True, False, False]


@pytest.mark.gloo
def test_the_group_goes_on_after_a_disagreement(world: dict[int, dict[str, Any]]) -> None:
    assert all(world[rank]["after"] == [[6] * SLOTS] for rank in RANKS)
    assert all(world[rank]["async"] == [4, 8, 12] for rank in RANKS)


@pytest.mark.gloo
def test_what_is_posted_first_enters_first_also_where_one_rank_is_late(
    world: dict[int, dict[str, Any]],
) -> None:
    assert all(world[rank]["late"] == [[[0], [1], [2], [3]], 22, 26] for rank in RANKS)


@pytest.mark.gloo
def test_every_post_is_one_collective(world: dict[int, dict[str, Any]]) -> None:
    posts = 2 * len(SHARDINGS) + 1 + 6 + 1 + 1 + 3
    assert [world[rank]["collectives"] for rank in RANKS] == [posts] * 4


@pytest.mark.gloo
def test_other_options_or_models_are_found_when_the_group_is_made(
    world: dict[int, dict[str, Any]],
) -> None:
    for rank in RANKS:
        assert "another cache config" in world[rank]["options"]
        assert "run different models" in world[rank]["model"]
    assert "ranks [2]" in world[0]["options"]
    assert "ranks [0, 1, 3]" in world[2]["options"]


@pytest.mark.gloo
def test_replicas_never_wait_for_nor_sum_across_each_other(
    world: dict[int, dict[str, Any]],
) -> None:
    assert world[0]["replica"] == world[1]["replica"] == [2] * 3
    assert world[2]["replica"] == world[3]["replica"] == [200] * 7


@pytest.mark.gloo
def test_every_stage_learns_what_all_stages_hold(world: dict[int, dict[str, Any]]) -> None:
    assert all(world[rank]["stages"] == [[4, 2], [0, 6]] for rank in RANKS)


@pytest.mark.gloo
def test_a_gather_brings_every_row_to_every_rank(world: dict[int, dict[str, Any]]) -> None:
    rows = {str(rank): [rank, rank * rank] for rank in RANKS}
    assert all(world[rank]["gather"] == rows for rank in RANKS)


@pytest.mark.gloo
def test_a_rank_that_never_arrives_is_named_within_the_limit(
    world: dict[int, dict[str, Any]],
) -> None:
    for rank in (0, 1, 2):
        assert "Did not arrive: rank 3" in world[rank]["absent"]
        assert "generation 5, step 6, branch 1" in world[rank]["absent"]
        assert world[rank]["absent_s"] < 3.0 + 4.0


@pytest.mark.gloo
def test_a_rank_that_never_applies_the_cache_is_named_too(
    world: dict[int, dict[str, Any]],
) -> None:
    for rank in (0, 1, 2):
        assert "the first meeting of the decision group" in world[rank]["alone"]
        assert "Did not arrive: rank 3" in world[rank]["alone"]
        assert world[rank]["alone_s"] < 4.0 + 6.0


@pytest.mark.gloo
@pytest.mark.parametrize("threshold", [0.02, 0.08, 0.1, 0.12, 0.15, 0.3])
def test_any_sharding_gives_the_same_decision(
    world: dict[int, dict[str, Any]], threshold: float
) -> None:
    gate = ChiSquareGate(threshold)
    decisions = set()
    for rank in RANKS:
        for slots in world[rank]["float32"].values():
            found = Moments.decode(slots, EXPONENT)
            evidence = Evidence(
                change=found.change,
                change_squared=found.change_squared,
                reference=found.reference,
                tokens=found.tokens,
                dim=96,
                lag=1,
                noise_levels=(0.8, 0.9, None),
            )
            decisions.add(gate.judge(evidence).may_skip)
    # The change is 10 %.
    assert decisions == {threshold > 0.12}


@pytest.mark.gloo
def test_a_pipeline_runs_under_plain_torch_distributed() -> None:
    reports = run_world("plain_worker.py", 2, timeout_s=120, with_xfuser=False).values()
    assert not any(report["xfuser"] for report in reports)
    assert all(report["never"]["exact"] and not report["ever"]["exact"] for report in reports)
    assert all(report["ever"]["block_approx_ratio"] >= 0.4 for report in reports)
    assert {report["ever"]["collectives_per_step"] for report in reports} == {1.0}
    assert len({report["ever"]["decisions_digest"] for report in reports}) == 1
    # Prompts of their own: said where inputs are compared, and what replicas need instead.
    for rank, report in enumerate(reports):
        message = report["other prompts"]
        assert f"ranks [{1 - rank}] were given other inputs" in message
        assert "give process_group" in message


@pytest.mark.gloo
def test_a_disagreement_says_which_rank_stands_where(world: dict[int, dict[str, Any]]) -> None:
    for rank in RANKS:
        message = world[rank]["places"]["step"]
        assert "ranks [0, 1, 2] at generation 2, step 4, branch 0" in message
        assert "ranks [3] at generation 2, step 5, branch 0" in message
        setup = world[rank]["places"]["setup"]
        assert "ranks [0, 1, 3] at generation 2, step 4, branch 0, batch 1" in setup
        assert "ranks [2] at generation 2, step 4, branch 0, batch 2" in setup


def test_a_single_process_needs_no_wire() -> None:
    consensus = make()
    moments = torch.arange(2 * SLOTS).reshape(2, SLOTS)
    assert round_trip(consensus, Header(0, 0, 0, 0), moments) == moments.tolist()
    assert consensus.collectives == 1
    assert consensus.absent() == {}


def test_a_header_fits_many_ranks_without_wrapping() -> None:
    largest = 2**DIGEST_BITS - 1
    assert 2**14 * largest**2 < 2**63
    consensus = make()
    zeros = torch.zeros(1, SLOTS, dtype=torch.int64)
    assert raised(round_trip, consensus, Header(10**6, 10**4, 9, largest), zeros) == ""


def test_nccl_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="use sync_backend='gloo'"):
        make(backend="nccl")


def test_nccl_without_a_group_of_its_ranks_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"ranks that decide together, \[0, 1, 2\].*'gloo'"):
        make(backend="nccl", group=DecisionGroup(ranks=(0, 1, 2)))

"""Ranks that do not decide together: data-parallel replicas, and xDiT's separate VAE ranks."""

from __future__ import annotations

from typing import Any

import pytest
from support.worlds import run_world

pytestmark = pytest.mark.gloo


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="data 2"),
        pytest.param(2, id="data 2 x ulysses 2", marks=pytest.mark.slow),
    ],
)
def replicas(request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    """What the ranks of each replica report."""
    ulysses = request.param
    world = run_world(
        "replicas_worker.py", 2 * ulysses, "replicas", f"--ulysses_degree={ulysses}", timeout_s=120
    )
    found = [[r for r in world.values() if r["replica"] == replica] for replica in (0, 1)]
    assert [len(ranks) for ranks in found] == [ulysses, ulysses]
    return found


def latents(case: list[dict[str, Any]]) -> str:
    """The one digest of latents that a replica's ranks report for a case."""
    (found,) = {rank["latents"] for rank in case} - {None}
    return found


def test_a_replica_is_a_decision_group(replicas: list[list[dict[str, Any]]]) -> None:
    groups = [{tuple(rank["group"]) for rank in ranks} for ranks in replicas]
    assert all(len(group) == 1 for group in groups)
    assert not set(*groups[0]) & set(*groups[1])


def test_replicas_decide_on_their_own(replicas: list[list[dict[str, Any]]]) -> None:
    decisions = [{rank["own"]["decisions"] for rank in ranks} for ranks in replicas]
    assert [len(found) for found in decisions] == [1, 1]
    assert decisions[0] != decisions[1]
    assert all(rank["own"]["hits"] > 0 for ranks in replicas for rank in ranks)


@pytest.mark.parametrize("prompt", [0, 1])
def test_a_replica_draws_what_another_would_draw_of_its_prompt(
    replicas: list[list[dict[str, Any]]], prompt: int
) -> None:
    """Bit for bit, whatever the other replica draws at the same time."""
    with_other = [rank["own"] for rank in replicas[prompt]]
    for ranks in replicas:
        with_same = [rank["same"][prompt] for rank in ranks]
        assert latents(with_same) == latents(with_other)
        assert {r["decisions"] for r in with_same} == {r["decisions"] for r in with_other}
    (uncached,) = {rank["uncached"] for rank in replicas[prompt]} - {None}
    assert latents(with_other) != uncached


@pytest.mark.parametrize("turn", [0, 1])
def test_a_replica_generates_while_the_other_does_nothing(
    replicas: list[list[dict[str, Any]]], turn: int
) -> None:
    """Three times; to wait for the other would end in an error after `sync_timeout_s`."""
    own = latents([rank["own"] for rank in replicas[turn]])
    (turns,) = [rank["turns"] for rank in replicas[turn] if rank["turns"] != [None] * 3]
    assert turns == [own] * 3


@pytest.fixture(scope="module")
def vae() -> dict[int, dict[str, Any]]:
    """Ranks 0 and 1 run the transformer, rank 2 the VAE."""
    return run_world("replicas_worker.py", 3, "vae", timeout_s=120)


def test_xdit_itself_cannot_set_up_a_vae_rank(vae: dict[int, dict[str, Any]]) -> None:
    """The assertion, without a message: a rank that is in no model replica."""
    line = "group_coordinator.py, __init__: assert self.cpu_group is not None"
    assert vae[2]["control"] == line


def test_a_vae_rank_has_no_part_in_the_decisions(vae: dict[int, dict[str, Any]]) -> None:
    """The others generate with a cache while it waits; it is in none of their collectives."""
    others = [vae[0], vae[1]]
    assert [rank["group"] for rank in others] == [[0, 1], [0, 1]]
    assert len({rank["decisions"] for rank in others}) == 1
    assert all(rank["hits"] > 0 for rank in others)
    assert latents(others) not in {rank["uncached"] for rank in others}


def test_a_cache_on_a_vae_rank_is_refused(vae: dict[int, dict[str, Any]]) -> None:
    assert "rank 2 is a VAE rank of xDiT" in vae[2]["refused"]
    assert "runs no transformer" in vae[2]["refused"]

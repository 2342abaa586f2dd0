"""Sums by doubling: exact for every number of ranks, in as few rounds as can be.

Layers: one process, where threads stand in for ranks.
"""

from __future__ import annotations

import queue
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from xfuser_fastcache.consensus.doubling import doublings, sum_of_all

LIMIT_S = 20.0


def run(vectors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    """Return what each of some ranks has in the end, and how many messages it sent."""
    ranks = len(vectors)
    wires: dict[tuple[int, int], queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)
    sent = [0] * ranks
    for source in range(ranks):
        for to in range(ranks):
            wires[source, to] = queue.Queue()

    def one(rank: int) -> torch.Tensor:
        def exchange(numbers: torch.Tensor, to: int, source: int) -> torch.Tensor:
            sent[rank] += 1
            wires[rank, to].put(numbers)
            return wires[source, rank].get(timeout=LIMIT_S)

        return sum_of_all(vectors[rank], rank, ranks, exchange)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks))), sent


@pytest.mark.parametrize("ranks", [*range(1, 18), 31, 32, 33, 48, 64])
def test_every_rank_has_the_sum_of_all_after_the_fewest_rounds(ranks: int) -> None:
    # Each rank has a digit of its own, so that one who is left out or counted twice shows.
    digits = torch.eye(ranks, dtype=torch.int64)
    noise = torch.randint(0, 2**40, (ranks, 3), generator=torch.Generator().manual_seed(ranks))
    vectors = list(torch.cat((digits, noise), dim=1))
    sums, sent = run(vectors)
    expected = torch.stack(vectors).sum(0)
    assert all(torch.equal(found, expected) for found in sums)
    assert sent == [doublings(ranks)] * ranks
    # Nobody knows of more than twice as many after a round.
    assert 2 ** doublings(ranks) >= ranks > 2 ** doublings(ranks) // 2


def test_what_a_rank_gave_stays_as_it_was() -> None:
    vectors = [torch.full((2,), rank) for rank in range(5)]
    run(vectors)
    assert [vector.tolist() for vector in vectors] == [[rank] * 2 for rank in range(5)]

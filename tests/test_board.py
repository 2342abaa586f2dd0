"""What ranks leave for each other in the store: meetings, places, failures and rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from xfuser_fastcache.consensus.board import Board
from xfuser_fastcache.consensus.errors import ConsensusError, ConsensusTimeout

RANKS = (0, 1)
FIRST = "the first meeting"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """One store for all the ranks, which are threads here."""
    made = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: made)
    return made


def on_ranks(work: Callable[[int], Any]) -> list[Any]:
    """Return what `work` returns, or raises, on each rank; at the same time."""
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except ConsensusError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in RANKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def met(timeout_s: float = 20.0) -> list[Board]:
    """Return the boards of two ranks that have met."""
    boards = [Board(RANKS, rank, timeout_s) for rank in RANKS]
    on_ranks(lambda rank: boards[rank].meet(rank, FIRST))
    return boards


def test_all_that_meet_learn_what_each_has_brought() -> None:
    rows = on_ranks(lambda rank: Board(RANKS, rank, 20.0).meet({"of": rank}, FIRST))
    assert rows == [{0: {"of": 0}, 1: {"of": 1}}] * 2


def test_ranks_meet_whatever_each_has_tried_alone_before() -> None:
    for attempt in range(3):  # rank 1 alone, and another number of times than rank 0
        with pytest.raises(ConsensusTimeout, match=r"Did not arrive: rank 0 \(never seen\)"):
            Board(RANKS, 1, 0.05).meet(attempt, FIRST)
    with pytest.raises(ConsensusTimeout, match=r"Did not arrive: rank 1 \(never seen\)"):
        Board(RANKS, 0, 0.05).meet("", FIRST)
    boards = [Board(RANKS, rank, 20.0) for rank in RANKS]
    assert on_ranks(lambda rank: boards[rank].meet(rank, FIRST)) == [{0: 0, 1: 1}] * 2
    assert boards[0].name == boards[1].name


def test_whoever_comes_late_to_a_meeting_that_has_ended_waits_for_the_next() -> None:
    def work(rank: int) -> dict[int, str]:
        if rank == 1:
            time.sleep(0.4)
        try:
            return Board(RANKS, rank, 0.2 if rank == 0 else 5.0).meet("early", FIRST)
        except ConsensusTimeout:
            return Board(RANKS, rank, 5.0).meet("again", FIRST)

    assert on_ranks(work) == [{0: "again", 1: "early"}] * 2


def test_a_rank_that_has_failed_is_named_with_its_error() -> None:
    first, second = met()
    for board in (first, second):
        board.arrive("step 4")
    second.fail("step 4: ValueError: no such prompt")
    first.arrive("step 5")
    with pytest.raises(
        ConsensusError,
        match="rank 0 waited at step 5 in vain: rank 1 failed at "
        "step 4: ValueError: no such prompt",
    ):
        first.check("step 5")
    assert first.absent() == {1: "failed at step 4: ValueError: no such prompt"}
    second.arrive("step 5")  # it has gone on
    first.check("step 5")
    assert first.absent() == {}


def test_what_all_have_failed_at_together_is_over() -> None:
    first, second = met()
    for board in (first, second):
        board.arrive("generation 0")
        board.fail("generation 0: ValueError: no such prompt")
    first.arrive("generation 1")  # and the other one is slow to begin it
    first.check("generation 1")
    second.arrive("generation 1")
    second.fail("generation 1: ValueError: nor this one")
    with pytest.raises(ConsensusError, match="nor this one"):
        first.check("generation 1")


def test_rows_come_to_all_and_a_missing_one_is_named() -> None:
    boards = met(0.3)
    rows = on_ranks(lambda rank: boards[rank].take(boards[rank].post([rank], "numbers")))
    assert rows == [{0: [0], 1: [1]}] * 2
    with pytest.raises(ConsensusTimeout, match=r"numbers \(2\).*Did not arrive: rank 1 \(no row\)"):
        boards[0].take(boards[0].post([0], "numbers"))


def test_a_wait_for_rows_ends_at_once_where_a_rank_has_failed() -> None:
    first, second = met(60.0)
    second.fail("step 1: RuntimeError: out of memory")
    started = time.monotonic()
    with pytest.raises(ConsensusError, match="out of memory"):
        first.take(first.post([0], "numbers"))
    assert time.monotonic() - started < 20


def test_old_rows_leave_the_store(store: dist.Store) -> None:
    boards = met()
    before = store.num_keys()
    for _ in range(40):
        on_ranks(lambda rank: boards[rank].take(boards[rank].post([rank], "numbers")))
    assert store.num_keys() - before < 24

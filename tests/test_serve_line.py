"""What ranks of a service tell each other: messages, signs of life, and who is missing.

Pure CPU, both ends in this process; tests/test_serve.py has real ranks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from xfuser_fastcache.serving.line import Line, RankMissing, StopSign

PATIENCE_S = 1.0


class Ends:
    """Rank 0's line and the bare connections of the ranks at its other ends."""

    def __init__(self, peers: int):
        pipes = {rank: Pipe() for rank in range(1, peers + 1)}
        self.lost: list[str] = []
        self.others = {rank: pipe[1] for rank, pipe in pipes.items()}
        connections: dict[int, Any] = {rank: pipe[0] for rank, pipe in pipes.items()}
        self.line = Line(0, connections, PATIENCE_S, self.lost.append, StopSign())
        self._stop = threading.Event()

    def live(self, rank: int) -> None:
        """Have a rank give signs of life, as its own line would."""

        def signs() -> None:
            while not self._stop.wait(PATIENCE_S / 5):
                self.others[rank].send_bytes(b'{"alive": true}')

        threading.Thread(target=signs, daemon=True).start()

    def await_loss(self) -> str:
        until = time.monotonic() + 5 * PATIENCE_S
        while not self.lost and time.monotonic() < until:
            time.sleep(0.02)
        (reason,) = self.lost
        return reason

    def close(self) -> None:
        self._stop.set()
        self.line.close()


@pytest.fixture
def two() -> Iterator[Ends]:
    ends = Ends(2)
    yield ends
    ends.close()


def read(connection: Connection) -> dict[str, Any]:
    """The next message that is no sign of life."""
    while connection.poll(5):
        message = json.loads(connection.recv_bytes())
        if "alive" not in message:
            return message
    raise AssertionError("no message")


def test_messages_go_both_ways(two: Ends) -> None:
    two.line.send({"draw": {"seed": 1}})
    for rank, other in two.others.items():
        assert read(other) == {"draw": {"seed": 1}}
        other.send_bytes(json.dumps({"seconds": rank}).encode())
    assert two.line.receive(5) == {1: {"seconds": 1}, 2: {"seconds": 2}}


def test_who_does_not_report_is_named(two: Ends) -> None:
    two.live(1)
    two.live(2)
    two.others[1].send_bytes(b'{"seconds": 1}')
    with pytest.raises(RankMissing, match="no word from rank 2 within 0.3 s"):
        two.line.receive(0.3)


def test_a_rank_that_dies_is_named_at_once(two: Ends) -> None:
    started = time.monotonic()
    two.others[2].close()
    assert two.await_loss() == "rank 2 ended the connection"
    assert time.monotonic() - started < PATIENCE_S


def test_a_rank_that_falls_silent_is_named(two: Ends) -> None:
    two.live(2)
    assert two.await_loss() == "no sign of life from rank 1 for 1 s"


def test_a_message_that_stops_half_way_is_a_loss(two: Ends) -> None:
    two.live(1)
    os.write(two.others[2].fileno(), b"\x00\x00\x01\x00half")
    assert two.await_loss() == "rank 2 ended the connection"


def test_a_connection_that_ends_after_the_farewell_is_no_loss(two: Ends) -> None:
    two.line.close()
    for other in two.others.values():
        other.close()
    time.sleep(2 * PATIENCE_S)
    assert not two.lost


def test_work_without_an_end_is_reported(two: Ends) -> None:
    two.live(1)
    two.live(2)
    two.line.expect(0.5, "request 7")
    assert two.await_loss() == "request 7 took longer than 0.5 s"


def test_an_error_of_one_rank_shortens_the_wait_for_the_others(two: Ends) -> None:
    two.live(1)
    two.live(2)
    two.line.expect(600, "request 7")
    two.others[2].send_bytes(b'{"error": "OutOfMemoryError: no"}')
    assert two.await_loss() == (
        "rank 2 failed (OutOfMemoryError: no), and the others did not end within 1 s"
    )


def test_work_that_ends_is_not_reported(two: Ends) -> None:
    two.live(1)
    two.live(2)
    two.line.expect(0.5, "request 7")
    two.line.rest()
    time.sleep(2 * PATIENCE_S)
    assert not two.lost


def test_a_stop_signal_reaches_the_other_end() -> None:
    here, there = Pipe()
    lost: list[str] = []
    first = Line(0, {1: here}, PATIENCE_S, lost.append, StopSign())
    second = Line(1, {0: there}, PATIENCE_S, lost.append, StopSign())
    second.stop.set("SIGTERM")
    time.sleep(PATIENCE_S)
    assert first.stop.reason == "SIGTERM"
    assert not lost
    for line in (first, second):
        line.close()

"""How ranks join a service: strangers at the port hold up nobody. Pure CPU, in this process."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from xfuser_fastcache.serving.joining import await_ranks, join
from xfuser_fastcache.serving.line import RankMissing

KEY = "xfuser_fastcache/serve/address"
HTTP = b"GET / HTTP/1.1\r\nHost: 10.0.0.1\r\nAccept: */*\r\nUser-Agent: scanner\r\n\r\n"


class Stores:
    """The store as rank 0 and as another rank has it."""

    def __init__(self) -> None:
        self.own = dist.TCPStore("127.0.0.1", 0, 1, True)
        self.other = dist.TCPStore("127.0.0.1", self.own.port, 1, False)

    def address(self) -> tuple[str, int]:
        host, port, _ = json.loads(self.other.get(KEY))
        return host, port


@pytest.fixture
def stores() -> Stores:
    return Stores()


def silent(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=20)


def says(words: bytes, address: tuple[str, int]) -> socket.socket:
    end = silent(address)
    end.sendall(words)
    return end


def resets(address: tuple[str, int]) -> socket.socket:
    end = says(b"\0\0", address)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
    return end


STRANGERS: dict[str, Any] = {
    "silent": silent,
    "garbage": lambda address: says(os.urandom(4096), address),
    "a number of a rank and no proof": lambda address: says(b"\0\0\0\1" + b"\0" * 32, address),
    "HTTP": lambda address: says(HTTP, address),
    "half a greeting": lambda address: says(b"\0\0\0\1", address),
    "reset": resets,
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_is_no_rank_and_holds_up_nobody(stores: Stores, kind: str) -> None:
    ends: list[socket.socket] = []
    joined: list[socket.socket] = []

    def strange_and_rank_1() -> None:
        ends.extend(STRANGERS[kind](stores.address()) for _ in range(20))
        joined.append(join(stores.other, 1, 20))

    thread = threading.Thread(target=strange_and_rank_1, daemon=True)
    thread.start()
    started = time.monotonic()
    found = await_ranks(stores.own, 2, 20)
    thread.join(5)
    assert time.monotonic() - started < 5
    assert sorted(found) == [1]
    joined[0].sendall(b"here")
    assert found[1].recv(4, socket.MSG_WAITALL) == b"here"
    for end in (*ends, *joined, *found.values()):
        end.close()


def test_each_handshake_has_a_limit_and_who_is_missing_is_named(stores: Stores) -> None:
    """A trickle is no progress: the limit is on the whole handshake."""
    ended: list[float] = []

    def trickle() -> None:
        end = silent(stores.address())
        started = time.monotonic()
        try:
            while time.monotonic() - started < 10:
                end.sendall(b"\0")
                time.sleep(0.1)
        except OSError:
            ended.append(time.monotonic() - started)

    threads = [
        threading.Thread(target=trickle, daemon=True),
        threading.Thread(target=lambda: join(stores.other, 1, 10), daemon=True),
    ]
    for thread in threads:
        thread.start()
    with pytest.raises(RankMissing, match="rank 2 did not connect within 3 s"):
        await_ranks(stores.own, 3, 3, handshake_s=1)
    threads[0].join(5)
    assert 0.9 < ended[0] < 2.5


def test_a_crowd_of_strangers_leaves_room_for_a_rank(stores: Stores) -> None:
    ends: list[socket.socket] = []

    def crowd_and_rank_1() -> None:
        ends.extend(silent(stores.address()) for _ in range(600))
        ends.append(join(stores.other, 1, 20))

    thread = threading.Thread(target=crowd_and_rank_1, daemon=True)
    thread.start()
    found = await_ranks(stores.own, 2, 20)
    assert sorted(found) == [1]
    thread.join(5)
    for end in (*ends, *found.values()):
        end.close()


def test_a_rank_0_that_does_not_answer_is_named(stores: Stores) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    stores.own.set(KEY, json.dumps(["127.0.0.1", port, "00"]))
    started = time.monotonic()
    with pytest.raises(RankMissing, match=rf"rank 0 did not answer at 127.0.0.1:{port} within 1 s"):
        join(stores.other, 1, 1)
    assert time.monotonic() - started < 5

"""How the ranks of a service find each other when it starts: each proves to rank 0 that it is one.

Between hosts the port is open to the network for a moment. Whoever else calls there, silent, with
garbage or with HTTP, is turned away within `_HANDSHAKE_S` and holds up nobody meanwhile.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from xfuser_fastcache.serving.line import Line, RankMissing, StopSign, names

_KEY = "xfuser_fastcache/serve/address"
_HANDSHAKE_S = 10.0
_MOST_STRANGERS = 256
_TICK_S = 0.1
_NONCE_BYTES = 32
_RANK_BYTES = 4
_GREETING_BYTES = _RANK_BYTES + 32
_WELCOME = b"+"


def connect(
    patience_s: float, on_loss: Callable[[str], None], stop: StopSign, limit_s: float = 120.0
) -> Line:
    """Connect all ranks of the process group to rank 0; every rank makes this call.

    The address and a key that is drawn anew each time go through the process group's store. Where
    all ranks are on this machine, rank 0 listens on loopback only.

    Args:
        patience_s: longest silence of a rank in seconds.
        on_loss: as of `Line`.
        stop: as of `Line`.
        limit_s: longest wait for the others in seconds.

    Raises:
        RankMissing: naming the ranks that did not connect, or rank 0.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ends: dict[int, socket.socket] = {}
    if world_size > 1:
        store = dist.distributed_c10d._get_default_store()
        ends = (
            await_ranks(store, world_size, limit_s)
            if rank == 0
            else {0: join(store, rank, limit_s)}
        )
    connections = {peer: Connection(end.detach()) for peer, end in ends.items()}
    return Line(rank, connections, patience_s, on_loss, stop)


def join(store: Any, rank: int, limit_s: float) -> socket.socket:
    """Connect to rank 0 and prove to be a rank.

    Args:
        store: of the process group.
        rank: this one.
        limit_s: longest wait for rank 0 in seconds.

    Raises:
        RankMissing: rank 0 opened no port, or did not answer there.
    """
    until = time.monotonic() + limit_s
    try:
        store.wait([_KEY], timedelta(seconds=limit_s))
    except dist.DistStoreError as error:
        raise RankMissing(f"rank 0 opened no line within {limit_s:g} s") from error
    host, port, key = json.loads(store.get(_KEY))
    while True:
        try:
            return _joined((host, port), bytes.fromhex(key), rank)
        except OSError as error:
            if time.monotonic() > until:
                raise RankMissing(
                    f"rank 0 did not answer at {host}:{port} within {limit_s:g} s: {error}"
                ) from error
            time.sleep(_TICK_S)


def _joined(address: tuple[str, int], key: bytes, rank: int) -> socket.socket:
    end = socket.create_connection(address, timeout=_HANDSHAKE_S)
    try:
        nonce = end.recv(_NONCE_BYTES, socket.MSG_WAITALL)
        number = rank.to_bytes(_RANK_BYTES, "big")
        end.sendall(number + _proof(key, nonce, number))
        if end.recv(1) != _WELCOME:
            raise ConnectionError("it ended the connection")
    except OSError:
        end.close()
        raise
    end.settimeout(None)
    return end


def _proof(key: bytes, nonce: bytes, number: bytes) -> bytes:
    return hmac.digest(key, nonce + number, "sha256")


@dataclass
class _Stranger:
    """A connection that has not proved yet to be a rank's."""

    end: socket.socket
    until: float
    nonce: bytes = field(default_factory=lambda: os.urandom(_NONCE_BYTES))
    said: bytes = b""

    def hear(self, key: bytes) -> int | None:
        """Return the rank that it proves to be; None while it has not said all.

        Raises:
            OSError: it is gone, or no rank.
        """
        heard = self.end.recv(_GREETING_BYTES - len(self.said))
        self.said += heard
        if not heard:
            raise ConnectionError("it left")
        if len(self.said) < _GREETING_BYTES:
            return None
        number, proof = self.said[:_RANK_BYTES], self.said[_RANK_BYTES:]
        if not hmac.compare_digest(proof, _proof(key, self.nonce, number)):
            raise ConnectionError("it does not know the key")
        self.end.setblocking(True)
        self.end.sendall(_WELCOME)
        return int.from_bytes(number, "big")


def await_ranks(
    store: Any, world_size: int, limit_s: float, handshake_s: float = _HANDSHAKE_S
) -> dict[int, socket.socket]:
    """Return a connection to each other rank; rank 0's part.

    Args:
        store: of the process group.
        world_size: all ranks, this one too.
        limit_s: longest wait for all of them, in seconds.
        handshake_s: longest that a connection may take to prove that it is a rank's.

    Raises:
        RankMissing: naming those that did not come.
    """
    one_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size
    listens, told = ("127.0.0.1",) * 2 if one_host else ("", os.environ["MASTER_ADDR"])
    key = secrets.token_bytes(32)
    with socket.create_server((listens, 0), backlog=_MOST_STRANGERS) as door:
        door.setblocking(False)
        store.set(_KEY, json.dumps([told, door.getsockname()[1], key.hex()]))
        found = _greeted(door, key, world_size - 1, time.monotonic() + limit_s, handshake_s)
    missing = sorted(set(range(1, world_size)) - set(found))
    if missing:
        raise RankMissing(f"{names(missing)} did not connect within {limit_s:g} s")
    return found


def _greeted(
    door: socket.socket, key: bytes, count: int, until: float, handshake_s: float
) -> dict[int, socket.socket]:
    """Return the first `count` ranks that prove to be ones, or fewer at `until`."""
    found: dict[int, socket.socket] = {}
    strangers: dict[socket.socket, _Stranger] = {}  # oldest first

    with selectors.DefaultSelector() as ready:

        def forget(end: socket.socket) -> None:
            del strangers[end]
            ready.unregister(end)

        ready.register(door, selectors.EVENT_READ)
        while len(found) < count and time.monotonic() < until:
            for end in [event.fileobj for event, _ in ready.select(_TICK_S)]:
                try:
                    if end is door:
                        end, _ = door.accept()
                        end.setblocking(False)
                        ready.register(end, selectors.EVENT_READ)
                        strangers[end] = _Stranger(end, time.monotonic() + handshake_s)
                        end.sendall(strangers[end].nonce)
                    elif end in strangers:
                        rank = strangers[end].hear(key)
                        if rank is not None:
                            forget(end)
                            found[rank] = end
                except OSError:  # a stranger that left, or was turned away
                    if end in strangers:
                        forget(end)
                        end.close()
            now = time.monotonic()
            crowd = len(strangers) - _MOST_STRANGERS
            for place, (end, stranger) in enumerate(list(strangers.items())):
                if place < crowd or now > stranger.until:
                    forget(end)
                    end.close()
        for end in list(strangers):
            end.close()
    return found

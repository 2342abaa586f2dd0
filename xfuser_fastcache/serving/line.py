"""What the ranks of a service tell each other outside of the model: orders, reports, signs of life.

A star of sockets around rank 0, not collectives: a rank may wait for hours without a collective to
run out or a processor to burn, and a rank that dies ends its socket at once. One that stops without
dying is noticed by its silence.
"""

from __future__ import annotations

import json
import math
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_ALIVE = {"alive": True}


class RankMissing(RuntimeError):
    """A rank did not connect, report or leave in time; the message names it."""


class StopSign:
    """Why and since when a service is to end; set by a signal handler, or by another rank's.

    Attributes:
        reason: the signal's name; empty while nothing was said.
        since: on the monotonic clock, in seconds.
    """

    reason = ""
    since = math.inf

    def set(self, reason: str) -> None:
        """Ask for the end; the first reason stands."""
        if not self.reason:
            self.since = time.monotonic()
            self.reason = reason


class Line:
    """This rank's end of the line: rank 0 talks to all others, the others to rank 0.

    A thread reads, gives signs of life and watches for those of the others.

    Args:
        rank: this one.
        connections: to each rank that this one talks to.
        patience_s: longest silence of a connected rank in seconds.
        on_loss: called once, in the thread, with a sentence that names who is lost or late.
        stop: told to the other ends when it is set, and set when they tell.
    """

    def __init__(
        self,
        rank: int,
        connections: dict[int, Connection],
        patience_s: float,
        on_loss: Callable[[str], None],
        stop: StopSign,
    ):
        self.rank = rank
        self.connections = connections
        self.patience_s = patience_s
        self.on_loss = on_loss
        self.stop = stop
        self._inbox: dict[int, queue.SimpleQueue[dict[str, Any]]] = {
            peer: queue.SimpleQueue() for peer in connections
        }
        for connection in connections.values():
            _limit(connection, patience_s)
        self._sending = threading.Lock()
        self._closing = False
        self._deadline: tuple[float, str] | None = None
        self._thread = threading.Thread(target=self._listen, name="serve-line", daemon=True)
        self._thread.start()

    def send(self, message: dict[str, Any]) -> None:
        """Send to every connected rank; one that is gone is left to the thread's notice."""
        data = json.dumps(message).encode()
        with self._sending:
            for connection in self.connections.values():
                try:
                    connection.send_bytes(data)
                except OSError:
                    continue

    def receive(self, limit_s: float | None = None) -> dict[int, dict[str, Any]]:
        """Return the next message of every connected rank.

        Args:
            limit_s: longest wait in seconds; None waits as long as the ranks are alive, which the
                thread watches.

        Raises:
            RankMissing: after `limit_s`, naming the ranks without a message.
        """
        until = None if limit_s is None else time.monotonic() + limit_s
        found = {}
        for peer, inbox in self._inbox.items():
            try:
                left = None if until is None else max(0.0, until - time.monotonic())
                found[peer] = inbox.get(timeout=left)
            except queue.Empty:
                continue
        missing = sorted(set(self._inbox) - set(found))
        if missing:
            raise RankMissing(f"no word from {names(missing)} within {limit_s:g} s")
        return found

    def expect(self, limit_s: float, what: str) -> None:
        """Have `on_loss` called where `rest` does not follow within `limit_s` seconds."""
        self._deadline = (time.monotonic() + limit_s, f"{what} took longer than {limit_s:g} s")

    def hurry(self, why: str) -> None:
        """Leave what is expected `patience_s` from now, and no longer than before."""
        soon = time.monotonic() + self.patience_s
        if self._deadline is not None and soon < self._deadline[0]:
            self._deadline = (
                soon,
                f"{why}, and the others did not end within {self.patience_s:g} s",
            )

    def rest(self) -> None:
        """Expect nothing."""
        self._deadline = None

    def close(self) -> None:
        """End the thread; connections that end from now on are no loss."""
        self._closing = True

    def _listen(self) -> None:
        interval = min(1.0, self.patience_s / 5)
        peers: dict[Any, int] = {connection: peer for peer, connection in self.connections.items()}
        heard = dict.fromkeys(self.connections, time.monotonic())
        next_sign = 0.0
        while not self._closing:
            ready: Any
            for ready in wait(list(peers), interval):
                peer = peers[ready]
                try:
                    message = json.loads(ready.recv_bytes())
                except (EOFError, OSError):
                    return self._lose(f"{names([peer])} ended the connection")
                heard[peer] = time.monotonic()
                self._take(peer, message)
            now = time.monotonic()
            if now >= next_sign:
                next_sign = now + interval
                self.send(_ALIVE | ({"stop": self.stop.reason} if self.stop.reason else {}))
            silent = [peer for peer, last in heard.items() if now - last > self.patience_s]
            if silent:
                return self._lose(f"no sign of life from {names(silent)} for {self.patience_s:g} s")
            deadline = self._deadline
            if deadline is not None and now > deadline[0]:
                return self._lose(deadline[1])

    def _take(self, peer: int, message: dict[str, Any]) -> None:
        if "stop" in message:
            self.stop.set(message["stop"])
        if "alive" in message:
            return
        if message.get("leave"):
            self._closing = True
        if message.get("error"):
            self.hurry(f"{names([peer])} failed ({message['error']})")
        self._inbox[peer].put(message)

    def _lose(self, what: str) -> None:
        if not self._closing:
            self.on_loss(what)


def _limit(connection: Connection, seconds: float) -> None:
    """Have a message that stops half way end as an `OSError`."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, limit)


def names(ranks: list[int]) -> str:
    """Return ranks as words: "rank 1", "ranks 1, 3"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

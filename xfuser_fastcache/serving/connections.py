"""Connections that end: how many there are at a time, and how long a request may take to arrive.

uvicorn limits neither: a connection that says nothing, or half a request, would be held for ever.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Arrivals:
    """The connections of a server whose request has not arrived in full, oldest first.

    Args:
        most: connections at a time; one more ends the one whose request is longest in coming.
        limit_s: longest that a request may take from its connection, or from the answer before it,
            to its last byte, in seconds.
    """

    def __init__(self, most: int, limit_s: float):
        self.most = most
        self.limit_s = limit_s
        self.incomplete: dict[BoundedProtocol, asyncio.TimerHandle] = {}


class BoundedProtocol(H11Protocol):
    """HTTP on one connection, which ends where its request does not arrive.

    Args:
        arrivals: of the server.
        **uvicorns: what uvicorn gives to a protocol.
    """

    def __init__(self, *, arrivals: Arrivals, **uvicorns: Any):
        super().__init__(**uvicorns)
        self.arrivals = arrivals

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, at the cost of the one that is longest in coming."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.arrivals.most:
            oldest = next(iter(self.arrivals.incomplete))
            oldest._forget()
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request on this connection."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        coming = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not coming or self.transport.is_closing():
            self._forget()
        elif self not in self.arrivals.incomplete:
            timer = self.loop.call_later(self.arrivals.limit_s, self._late)
            self.arrivals.incomplete[self] = timer

    def _forget(self) -> None:
        timer = self.arrivals.incomplete.pop(self, None)
        if timer is not None:
            timer.cancel()

    def _late(self) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # it has no answer yet
            reason = f"the request did not arrive within {self.arrivals.limit_s:g} s"
            body = json.dumps({"detail": reason}).encode()
            head = (
                "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self._forget()
        self.transport.close()

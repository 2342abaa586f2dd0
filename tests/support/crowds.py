"""Clients of a service that come in crowds: those that draw, and those that say too little."""

from __future__ import annotations

import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from support.failing_methods import MESSAGE
from support.served import Served

HALF = (
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 90000\r\n\r\n{"prompt": "' + b"a" * 40_000
)
SMALL = {"height": 64, "width": 64, "num_inference_steps": 3, "seed": 1}
# What is asked for, the status, and a part of the reason where it is refused.
MIXED: tuple[tuple[dict[str, Any], int, str], ...] = (
    (SMALL, 200, ""),
    (SMALL | {"use_cache": False}, 200, ""),
    (SMALL | {"height": 96, "num_inference_steps": 4}, 200, ""),
    (SMALL | {"use_cache": "TaylorSeer", "cache_config": {"cache_interval": 2}}, 200, ""),
    (SMALL | {"height": 100}, 422, "height=100 is not allowed"),
    (SMALL | {"cache_config": {"linear_maps": "/etc/passwd"}}, 422, "linear_maps='/etc/passwd'"),
    (SMALL | {"cache_config": {"steps_mask": [1, 0]}}, 422, "2 entries, but this generation"),
    (SMALL | {"use_cache": "Failing", "num_inference_steps": 8}, 503, MESSAGE),
)


class SilentCrowd:
    """Connections that stay without a whole request, opened a wave at a time.

    Args:
        service: that they go to.
        count: of connections.
        words: what each says.
    """

    def __init__(self, service: Served, count: int, words: bytes):
        self.address = (httpx.URL(service.url).host, httpx.URL(service.url).port)
        self.words = words
        self.ends = [self._open() for _ in range(count)]

    def _open(self) -> socket.socket:
        end = socket.create_connection(self.address, timeout=60)
        end.setblocking(False)
        try:
            end.send(self.words)
        except OSError:
            pass  # it is ended already, for one that came later
        return end

    def all_ended(self, limit_s: float) -> bool:
        """Say whether the service ends all of them within a time, and close them."""
        until = time.monotonic() + limit_s
        left = list(self.ends)
        while left and time.monotonic() < until:
            left = [end for end in left if not _ended(end)]
            time.sleep(0.1)
        for end in self.ends:
            end.close()
        return not left


def _ended(end: socket.socket) -> bool:
    try:
        while end.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def mixed_requests(service: Served, count: int, pictures: dict[int, str]) -> Counter[int]:
    """Send requests of all kinds, four at a time; return the answers by status.

    Args:
        service: that draws.
        count: of requests.
        pictures: by kind, of those that came before; each must be drawn to the bit again.
    """

    def one(number: int) -> int:
        kind = number % len(MIXED)
        body, status, reason = MIXED[kind]
        answer = service.draw(**body)
        assert answer.status_code == status, (body, answer.text[:300])
        if status == 200:
            image = answer.json()["image"]
            assert pictures.setdefault(kind, image) == image, body
        else:
            assert reason in answer.json()["detail"]
        return status

    with ThreadPoolExecutor(4) as clients:
        return Counter(clients.map(one, range(count)))

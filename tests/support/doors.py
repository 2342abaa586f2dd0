"""A service's HTTP in this process, without ranks: nobody draws, or a painter that tests lead."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from PIL import Image

from xfuser_fastcache.serving.desk import Desk
from xfuser_fastcache.serving.drawing import Step
from xfuser_fastcache.serving.heads import LOOPBACK
from xfuser_fastcache.serving.line import StopSign
from xfuser_fastcache.serving.requests import Limits
from xfuser_fastcache.serving.service import Service
from xfuser_fastcache.serving.web import WebServer, listen, make_app

READ_S = 1.5
LIMITS = Limits(
    max_side=256,
    height_multiple=16,
    width_multiple=16,
    max_steps=8,
    max_prompt_length=100,
    negative_prompts=True,
    two_branches=False,
)
STATISTICS = {
    **{"steps": 4, "audits": 4, "false_skip_rate": 0.25},
    "blocks": {"blocks.0": {"computed": 3, "skipped": 1}},
}
DECISIONS = [
    {"branch": branch, "first_block": "blocks.0", "last_block": "blocks.3", "steps": steps}
    for branch, steps in enumerate(("fs-c", "fs-s"))
]
DEFAULTS = {"height": 128, "width": 128, "num_inference_steps": 4, "guidance_scale": 3.5}


class Door:
    """A service that answers HTTP and has nobody who draws, unless a painter is given."""

    def __init__(self, painter: Any = None, queue_size: int = 2) -> None:
        self.service = Service(
            painter,
            StopSign(),
            queue_size=queue_size,
            generation_timeout_s=60,
            drain_timeout_s=1,
        )
        socket_ = listen("127.0.0.1", 0)
        desk = Desk(self.service, LIMITS, DEFAULTS, None, 60)
        app = make_app(desk, {"model": "toys/flux"}, {*LOOPBACK, "pictures.lan"})
        self.address = socket_.getsockname()
        self.web = WebServer(app, socket_, READ_S)
        self.client = httpx.Client(base_url=self.web.address, timeout=20)
        for _ in range(100):
            try:
                self.client.get("/health")
                break
            except httpx.ConnectError:
                time.sleep(0.05)

    def say(self, words: bytes) -> socket.socket:
        """Open a connection, and say words on it."""
        end = socket.create_connection(self.address, timeout=20)
        end.sendall(words)
        return end

    def outcome(self, name: str) -> int:
        """How many requests ended so."""
        return self.service.meters.statistics()["requests"][name]

    def held(self) -> int:
        """Connections that it holds."""
        return len(self.web.server.server_state.connections)

    def close(self) -> None:
        """End it."""
        self.client.close()
        self.web.close()


class LedPainter:
    """Draws plain pictures, a step whenever it may; in place of painter and line of one rank.

    Attributes:
        steps: released by a test for each step that may be done.
        free: whether steps need no release.
        drawn: the orders, as they were begun.
    """

    patience_s = 1.0

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.free = False
        self.drawn: list[dict[str, Any]] = []

    def attempt(self, order: dict[str, Any], tell: Callable[[Step], None]) -> dict[str, Any]:
        self.drawn.append(order)
        of = order["num_inference_steps"]
        for done in range(of + 1):
            tell(Step(done, of, max(0, done - 1) / of))
            if done < of and not self.free:
                assert self.steps.acquire(timeout=20)
        if order["prompt"] == "fail":
            return {"error": "RuntimeError: no", "place": "after", "memory_bytes": 1}
        picture = io.BytesIO()
        colour = (order["seed"] % 256, 0, 0)
        Image.new("RGB", (order["width"], order["height"]), colour).save(picture, "PNG")
        return {
            **{"error": None, "place": "after", "seconds": 0.25, "memory_bytes": 1},
            **{"statistics": STATISTICS, "decisions": DECISIONS},
            "picture": base64.b64encode(picture.getvalue()).decode(),
        }

    def receive(self) -> dict[int, dict[str, Any]]:
        return {}

    def expect(self, limit_s: float, what: str) -> None: ...
    def hurry(self, why: str) -> None: ...
    def rest(self) -> None: ...
    def send(self, message: dict[str, Any]) -> None: ...


class LedDoor(Door):
    """A service with a `LedPainter`."""

    def __init__(self, queue_size: int = 2) -> None:
        self.painter = LedPainter()
        super().__init__(self.painter, queue_size)
        line: Any = self.painter
        self.thread = threading.Thread(target=self.service.run, args=(line,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End it."""
        self.painter.free = True
        self.painter.steps.release(100)
        self.service.stop.set("the test is over")
        self.thread.join(10)
        super().close()


def eventually(fact: Any, limit_s: float = 5.0) -> bool:
    until = time.monotonic() + limit_s
    while not fact():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def events(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The word and body of each server-sent event."""
    word = ""
    for line in answer.iter_lines():
        kind, _, rest = line.partition(": ")
        if kind == "event":
            word = rest
        elif kind == "data":
            yield word, json.loads(rest)

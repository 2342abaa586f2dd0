"""The queue on rank 0: takes requests, has all ranks draw them one after another, and ends well."""

from __future__ import annotations

import base64
import logging
import math
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from xfuser_fastcache.serving.drawing import Painter
from xfuser_fastcache.serving.line import Line, StopSign, names
from xfuser_fastcache.serving.meters import Meters
from xfuser_fastcache.serving.requests import RequestRefused

logger = logging.getLogger("xfuser_fastcache")

_TICK_S = 0.25
_LAST_WORDS_S = 3.0


class QueueFull(RuntimeError):
    """No room for another request.

    Attributes:
        retry_after_s: when there may be, in whole seconds.
    """

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Stopping(RuntimeError):
    """The service takes no more requests, or could not finish this one."""


@dataclass
class Answer:
    """A drawn picture.

    Attributes:
        picture: PNG.
        statistics: of the cache; empty without one.
        seconds: of the denoising loop on the slowest rank.
        waited_s: in the queue.
        order: what was drawn, with everything that the request left out.
    """

    picture: bytes
    statistics: dict[str, Any]
    seconds: float
    waited_s: float
    order: dict[str, Any]


@dataclass
class _Job:
    number: int
    order: dict[str, Any]
    answer: Future[Answer] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Service:
    """What rank 0 does; `run` belongs to the main thread, everything else to any.

    Args:
        painter: draws on this rank.
        stop: set when the service is to end.
        queue_size: most requests that wait; the one being drawn is not among them.
        generation_timeout_s: longest that one picture may take, in seconds; then the service ends,
            for a rank does not answer.
        drain_timeout_s: how long waiting requests are still begun once the service is told to end.
    """

    def __init__(
        self,
        painter: Painter,
        stop: StopSign,
        *,
        queue_size: int,
        generation_timeout_s: float,
        drain_timeout_s: float,
    ):
        self.painter = painter
        self.stop = stop
        self.queue_size = queue_size
        self.generation_timeout_s = generation_timeout_s
        self.drain_timeout_s = drain_timeout_s
        self.broken = ""
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._changed = threading.Condition()
        self._ending = threading.Lock()
        self._taken = 0
        self.meters = Meters(self._count_waiting, lambda: int(self._running is not None))

    def submit(self, order: dict[str, Any]) -> Future[Answer]:
        """Put an order in the queue; a future that is cancelled before its turn is left out.

        Raises:
            QueueFull: naming the bound.
            Stopping: the service is about to end.
        """
        with self._changed:
            if self.stop.reason or self.broken:
                self.meters.count("stopping")
                raise Stopping(self.broken or f"the service is stopping ({self.stop.reason})")
            waiting = self._count_waiting()
            if waiting >= self.queue_size:
                self.meters.count("full")
                mean = self.meters.statistics()["mean_generation_s"] or 1.0
                raise QueueFull(
                    f"{waiting} requests are waiting, and no more than {self.queue_size} may "
                    "(--queue_size); come back later",
                    math.ceil(mean * (waiting + 1)),
                )
            self._taken += 1
            job = _Job(self._taken, order)
            self._waiting.append(job)
            self._changed.notify()
            return job.answer

    def run(self, line: Line) -> None:
        """Serve until the stop sign is set and the queue is empty or its time over."""
        while True:
            stopping = self.stop.reason  # read before the queue, which nothing enters afterwards
            job = self._next()
            if job is None and stopping:
                return
            if job is None or not job.answer.set_running_or_notify_cancel():
                continue
            if time.monotonic() > self.stop.since + self.drain_timeout_s:
                self.meters.count("stopping")
                job.answer.set_exception(
                    Stopping(f"the service stopped ({stopping}) before this request's turn")
                )
                continue
            self._running = job
            self._draw(job, line)
            self._running = None

    def break_down(self, reason: str) -> None:
        """Say why, answer everybody who waits, and end this process with status 1; any thread.

        It does not return: the main thread may stand in a collective that nothing else ends.
        """
        with self._ending:
            logger.error("rank 0: %s. The service ends.", reason)
            with self._changed:
                self.broken = f"the service ends: {reason}"
                jobs = [*self._waiting, *([self._running] if self._running else [])]
            for job in jobs:
                if job.answer.cancelled() or job.answer.done():
                    continue
                self.meters.count("failed")
                job.answer.set_exception(Stopping(self.broken))
            time.sleep(_LAST_WORDS_S if jobs else 0)  # for the answers to leave
            os._exit(1)

    def _count_waiting(self) -> int:
        return sum(not job.answer.cancelled() for job in list(self._waiting))

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting, _TICK_S)
            return self._waiting.popleft() if self._waiting else None

    def _draw(self, job: _Job, line: Line) -> None:
        waited_s = time.monotonic() - job.since
        line.expect(self.generation_timeout_s, f"request {job.number}")
        line.send({"draw": job.order})
        reports = {0: self.painter.attempt(job.order)}
        if reports[0]["error"]:
            line.hurry(f"rank 0 failed ({reports[0]['error']})")
        reports |= line.receive()
        line.rest()
        errors = {rank: report["error"] for rank, report in reports.items() if report["error"]}
        if errors:
            same = len(errors) == len(reports) and len(set(errors.values())) == 1
            if not same or any(report["entered"] for report in reports.values()):
                said = "; ".join(f"{names([rank])}: {error}" for rank, error in errors.items())
                self.break_down(f"request {job.number} failed in the model on {said}")
            # Every rank refused it alike before the model was called: nothing is half done.
            self.meters.count("refused")
            job.answer.set_exception(RequestRefused(errors[0].partition(": ")[2]))
            return
        (picture,) = [report["picture"] for report in reports.values() if "picture" in report]
        seconds = max(report["seconds"] for report in reports.values())
        statistics = reports[0]["statistics"]
        memory = {rank: report["memory_bytes"] for rank, report in reports.items()}
        self.meters.drawn(waited_s, seconds, statistics, memory)
        job.answer.set_result(
            Answer(base64.b64decode(picture), statistics, seconds, waited_s, job.order)
        )


def follow(line: Line, painter: Painter) -> None:
    """Draw what rank 0 orders until it says to leave; the other ranks' part."""
    while True:
        order = line.receive()[0]
        if order.get("leave"):
            return
        line.send(painter.attempt(order["draw"]))

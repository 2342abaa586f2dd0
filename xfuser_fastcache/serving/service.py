"""The queue on rank 0: takes requests, has all ranks draw them one after another, and ends well."""

from __future__ import annotations

import base64
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from xfuser_fastcache.serving.drawing import PLACES, Painter, Step
from xfuser_fastcache.serving.line import Line, StopSign, names
from xfuser_fastcache.serving.meters import Meters
from xfuser_fastcache.serving.requests import RequestRefused

logger = logging.getLogger("xfuser_fastcache")

_TICK_S = 0.25
_LAST_WORDS_S = 3.0
# Pictures whose times say how long the next ones may take.
_RECENT = 16


class QueueFull(RuntimeError):
    """No room for another request.

    Attributes:
        retry_after_s: when there may be, in whole seconds.
    """

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationFailed(RuntimeError):
    """This request's picture could not be drawn; others can."""


class Stopping(RuntimeError):
    """The service takes no more requests, or could not finish this one."""


@dataclass
class Answer:
    """A drawn picture.

    Attributes:
        picture: the file, in the order's `output_format`.
        statistics: of the cache; empty without one.
        decisions: of the cache, a row a span; see `reports.views.decision_rows`.
        seconds: of the denoising loop on the slowest rank.
        waited_s: in the queue.
        order: what was drawn, with everything that the request left out.
    """

    picture: bytes
    statistics: dict[str, Any]
    decisions: list[dict[str, Any]]
    seconds: float
    waited_s: float
    order: dict[str, Any]


@dataclass(eq=False)
class Job:
    """An order in the queue, or under way.

    Attributes:
        number: counted since the start.
        order: what all ranks run.
        answer: one that is cancelled before its turn is left out.
        since: when it came, on the monotonic clock in seconds.
        step: the last one that is done; older ones are forgotten, whoever has not seen them.
    """

    number: int
    order: dict[str, Any]
    answer: Future[Answer] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    step: Step | None = None

    def reach(self, step: Step) -> None:
        """Note a step that is done; called by the thread that draws."""
        self.step = step


class _Trial(NamedTuple):
    """The last small picture that showed that the ranks are in step, and how long it took."""

    picture: bytes = b""
    seconds: float = math.inf


class Service:
    """What rank 0 does; `run` belongs to the main thread, everything else to any.

    Args:
        painter: draws on this rank.
        stop: set when the service is to end.
        queue_size: most requests that wait; the one being drawn is not among them.
        generation_timeout_s: longest that one picture may take, in seconds; then the service ends,
            for a rank does not answer.
        drain_timeout_s: how long waiting requests are still begun once the service is told to end.

    Attributes:
        start_s: how long this service took to start, in seconds; for whoever it sends away.
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
        self.start_s = 0.0
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._ending = threading.Lock()
        self._taken = 0
        self._trial = _Trial()
        self._spent: deque[float] = deque(maxlen=_RECENT)  # by pictures, in seconds
        self._began = math.inf
        self.meters = Meters(lambda: len(self._waiting), lambda: int(self._running is not None))

    def submit(self, orders: list[dict[str, Any]]) -> list[Job]:
        """Put all of some orders in the queue, or none.

        Raises:
            QueueFull: naming the bound.
            Stopping: the service is about to end.
        """
        with self._changed:
            if self.stop.reason or self.broken:
                self.meters.count("stopping")
                raise Stopping(self.broken or f"the service is stopping ({self.stop.reason})")
            waiting = len(self._waiting)
            if waiting + len(orders) > self.queue_size:
                self.meters.count("full")
                raise QueueFull(
                    f"{waiting} requests are waiting, and no more than {self.queue_size} may "
                    "(--queue_size); come back later",
                    self.retry_after_s(),
                )
            jobs = [Job(self._taken + index, order) for index, order in enumerate(orders, 1)]
            self._taken += len(jobs)
            self._waiting.extend(jobs)
            self._changed.notify()
        for job in jobs:
            job.answer.add_done_callback(partial(self._leave, job))
        return jobs

    def ahead_of(self, job: Job) -> int | None:
        """Return how many requests are drawn before a job; None once it is under way."""
        with self._changed:
            if job not in self._waiting:
                return None
            return self._waiting.index(job) + (self._running is not None)

    def retry_after_s(self) -> int:
        """Return when all that is here now may be drawn, by the last pictures' times, in seconds.

        Whole ones, and at least one.
        """
        mean = sum(self._spent) / len(self._spent) if self._spent else 1.0
        running = max(0.0, mean - max(0.0, time.monotonic() - self._began))
        return max(1, math.ceil(mean * len(self._waiting) + running * (self._running is not None)))

    def away_s(self) -> int:
        """Return when another service may stand in this one's place, in whole seconds.

        It ends first, and the other one starts as long as this one did.
        """
        drain_s = self.stop.since + self.drain_timeout_s - time.monotonic()
        return max(1, math.ceil((max(0.0, drain_s) if self.stop.reason else 0.0) + self.start_s))

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
            self._began = time.monotonic()
            self._running = job
            self._draw(job, line)
            self._running = None
            self._spent.append(time.monotonic() - self._began)

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

    def _leave(self, job: Job, _: Future[Answer]) -> None:
        """Free the place of a job that was cancelled before its turn."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting, _TICK_S)
            return self._waiting.popleft() if self._waiting else None

    def _draw(self, job: Job, line: Line) -> None:
        waited_s = time.monotonic() - job.since
        what = f"request {job.number}"
        reports = self._on_all(job.order, line, what, self.generation_timeout_s, job.reach)
        failure = failure_of(reports)
        if failure is None:
            seconds = max(report["seconds"] for report in reports.values())
            statistics = reports[0]["statistics"]
            memory = {rank: report["memory_bytes"] for rank, report in reports.items()}
            self.meters.drawn(waited_s, seconds, statistics, memory)
            picture, decisions = picture_in(reports), reports[0]["decisions"]
            job.answer.set_result(
                Answer(picture, statistics, decisions, seconds, waited_s, job.order)
            )
            return
        if failure.refusal:
            self.meters.count("refused")
            job.answer.set_exception(RequestRefused(failure.said.partition(": ")[2]))
            return
        self.meters.count("failed")
        job.answer.set_exception(GenerationFailed(f"this picture failed: {failure.said}"))
        if not failure.drawn:
            self.try_out(line, f"{what} failed, and the trial after it")

    def try_out(self, line: Line, what: str) -> None:
        """Have all ranks draw a small picture; end the service where it is not as it was before.

        The first is drawn before there are requests. Later ones show, after ranks have left a
        generation half way, that nothing of it is left between them.

        Args:
            line: to the other ranks.
            what: this is, for messages.
        """
        started = time.monotonic()
        limit_s = min(self.generation_timeout_s, line.patience_s + 2 * self._trial.seconds)
        reports = self._on_all(self.painter.trial(), line, what, limit_s)
        failure = failure_of(reports)
        if failure is not None:
            self.break_down(f"{what} failed on {failure.said}")
        picture = picture_in(reports)
        if self._trial.picture not in (b"", picture):
            self.break_down(f"{what} drew another picture than before")
        self._trial = _Trial(picture, time.monotonic() - started)

    def _on_all(
        self,
        order: dict[str, Any],
        line: Line,
        what: str,
        limit_s: float,
        tell: Callable[[Step], None] = lambda _: None,
    ) -> dict[int, dict[str, Any]]:
        """Run an order on all ranks and return their reports; `tell` as of `Painter.attempt`."""
        line.expect(limit_s, what)
        line.send({"draw": order})
        reports = {0: self.painter.attempt(order, tell)}
        if reports[0]["error"]:
            line.hurry(f"rank 0 failed ({reports[0]['error']})")
        reports |= line.receive()
        line.rest()
        return reports


@dataclass(frozen=True)
class Failure:
    """How an order failed.

    Attributes:
        refusal: whether all ranks refused it alike before the model was called.
        drawn: whether all ranks had done their work with others before.
        said: the error; where ranks met different ones, each with its ranks.
    """

    refusal: bool
    drawn: bool
    said: str


def failure_of(reports: dict[int, dict[str, Any]]) -> Failure | None:
    """Return what ranks' reports say of a failure; None where no rank failed.

    Example:
        >>> told = {"place": "within", "error": "ValueError: no"}
        >>> failure_of({0: told, 1: told | {"error": "RuntimeError: timed out"}}).said
        'rank 0: ValueError: no; rank 1: RuntimeError: timed out'
    """
    failed = {rank: report["error"] for rank, report in reports.items() if report["error"]}
    if not failed:
        return None
    before, _, after = PLACES
    places = {report["place"] for report in reports.values()}
    alike = len(failed) == len(reports) and len(set(failed.values())) == 1
    each = "; ".join(f"{names([rank])}: {error}" for rank, error in failed.items())
    said = next(iter(failed.values())) if alike else each
    return Failure(alike and places == {before}, places == {after}, said)


def picture_in(reports: dict[int, dict[str, Any]]) -> bytes:
    """Return the PNG, which one of the ranks has."""
    (picture,) = [report["picture"] for report in reports.values() if "picture" in report]
    return base64.b64decode(picture)


def follow(line: Line, painter: Painter) -> None:
    """Draw what rank 0 orders until it says to leave; the other ranks' part."""
    while True:
        order = line.receive()[0]
        if order.get("leave"):
            return
        line.send(painter.attempt(order["draw"]))

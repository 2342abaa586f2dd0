"""The one way of a request, whichever door it came by: read, checked, queued, drawn or not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.serving.refusals import Declined
from xfuser_fastcache.serving.requests import (
    GenerateRequest,
    Limits,
    RequestRefused,
    Wanted,
    order_of,
    read_request,
)
from xfuser_fastcache.serving.service import (
    Answer,
    GenerationFailed,
    Job,
    QueueFull,
    Service,
    Stopping,
)

# How often a stream looks for news, in seconds; steps in between are left out.
_NEWS_S = 0.1
# A stream without news repeats the last; proxies end silent ones after a minute.
_REPEAT_S = 10.0


class HungUp(Exception):
    """The client has ended its connection."""


class Desk:
    """Takes requests to the queue and waits with their clients.

    Args:
        service: draws.
        limits: of this service.
        defaults: the service's flags, for fields that a request leaves out.
        own: the service's cache, or None.
        request_timeout_s: longest that a client waits, in seconds.
    """

    def __init__(
        self,
        service: Service,
        limits: Limits,
        defaults: dict[str, Any],
        own: CacheConfig | None,
        request_timeout_s: float,
    ):
        self.service = service
        self.limits = limits
        self.defaults = defaults
        self.own = own
        self.request_timeout_s = request_timeout_s

    async def read(self, request: Request, kind: type[Wanted]) -> Wanted:
        """Return what a request asks for.

        Raises:
            Declined: it is none, or wrong.
            HungUp: the client is gone.
        """
        try:
            return read_request(await request.body(), kind)
        except ClientDisconnect:
            self.service.meters.count("hung_up")
            raise HungUp from None
        except RequestRefused as error:
            raise self.refusal(str(error), error.field) from error

    def refusal(self, reason: str, field: str | None = None, **more: Any) -> Declined:
        """Count a wrong request and return what to raise."""
        self.service.meters.count("refused")
        return Declined(422, reason, field=field, **more)

    def submit(self, wanted: list[GenerateRequest]) -> list[Job]:
        """Put requests in the queue, all or none.

        Raises:
            Declined: they are wrong, or there is no room.
        """
        try:
            orders = [order_of(one, self.limits, self.defaults, self.own) for one in wanted]
        except RequestRefused as error:
            raise self.refusal(str(error), error.field) from error
        try:
            return self.service.submit(orders)
        except (QueueFull, Stopping) as error:
            raise self._declined(error) from error

    async def watch(
        self, request: Request, jobs: list[Job], every_s: float
    ) -> AsyncGenerator[None, None]:
        """Yield every so many seconds until all is drawn or something fails.

        What is not drawn by then is given up.

        Raises:
            HungUp: the client is gone.
            Declined: it took too long.
        """

        async def hung_up() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        drawn = [asyncio.wrap_future(job.answer) for job in jobs]
        gone = asyncio.create_task(hung_up())
        until = asyncio.get_running_loop().time() + self.request_timeout_s
        try:
            while pending := {future for future in drawn if not future.done()}:
                if any(future.exception() for future in drawn if future not in pending):
                    return
                if gone.done():
                    self._count("hung_up", len(pending))
                    raise HungUp
                left_s = until - asyncio.get_running_loop().time()
                if left_s <= 0:
                    self._count("timed_out", len(pending))
                    running = any(job.answer.running() for job in jobs)
                    began = "it is still being drawn" if running else "its turn did not come"
                    limit = f"{self.request_timeout_s:g}"
                    raise Declined(504, f"no picture within {limit} s: {began}")
                either: set[asyncio.Future[Any]] = {*pending, gone}
                timeout = min(left_s, every_s)
                await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                yield
        finally:
            gone.cancel()
            for future in drawn:
                future.cancel()

    async def answers(self, request: Request, jobs: list[Job]) -> list[Answer]:
        """Return what is drawn.

        Raises:
            HungUp: the client is gone.
            Declined: something failed, or took too long.
        """
        async for _ in self.watch(request, jobs, self.request_timeout_s):
            pass
        return self.results(jobs)

    def results(self, jobs: list[Job]) -> list[Answer]:
        """Return what is drawn, once `watch` is through.

        Raises:
            Declined: something failed.
        """
        for job in jobs:
            error = job.answer.exception(0) if not job.answer.cancelled() else None
            if error is not None:
                raise self._declined(error) from error
        return [job.answer.result(0) for job in jobs]

    async def news(
        self, request: Request, jobs: list[Job]
    ) -> AsyncGenerator[tuple[int, str, dict[str, Any]], None]:
        """Yield what is new until all is drawn: the job's index, a word and what goes with it.

        `waiting` comes with how many are `ahead`; `progress` with the last `step` that is done,
        how many there are, and the share of blocks skipped so far.
        A reader that is slow misses steps, and none are kept for it.

        Raises:
            HungUp, Declined: as of `answers`.
        """
        told: dict[int, Any] = {}
        clock = asyncio.get_running_loop().time
        async with aclosing(self.watch(request, jobs, _NEWS_S)) as ticks:
            async for _ in ticks:
                for index, job in enumerate(jobs):
                    word, body = self._state(job)
                    last, since = told.get(index, ({}, 0.0))
                    if body and (last != body or clock() - since > _REPEAT_S):
                        told[index] = body, clock()
                        yield index, word, body

    def _state(self, job: Job) -> tuple[str, dict[str, Any]]:
        step = job.step
        if step is not None:
            said = {"step": step.done, "steps": step.of, "block_approx_ratio": step.skipped}
            return "progress", said
        ahead = self.service.ahead_of(job)
        return "waiting", {} if ahead is None else {"ahead": ahead}

    def _declined(self, error: BaseException) -> Declined:
        if isinstance(error, RequestRefused):
            return Declined(422, str(error), field=error.field)
        if isinstance(error, QueueFull):
            return Declined(
                429, str(error), retry_after_s=error.retry_after_s, code="rate_limit_exceeded"
            )
        if isinstance(error, GenerationFailed):
            return Declined(503, str(error), retry_after_s=self.service.retry_after_s())
        if isinstance(error, Stopping):
            return Declined(503, str(error), retry_after_s=self.service.away_s())
        raise error

    def _count(self, outcome: str, pictures: int) -> None:
        for _ in range(pictures):
            self.service.meters.count(outcome)


class Events(Response):
    """Server-sent events.

    Args:
        events: pairs of a word and what goes with it.
        decline: turns what ends them early into a last event's body.
    """

    def __init__(
        self,
        events: AsyncGenerator[tuple[str, dict[str, Any]], None],
        decline: Callable[[Declined], dict[str, Any]],
    ):
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self.events = events
        self.decline = decline

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them one after another; one that is not taken holds up the next."""
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )

        async def say(text: str) -> None:
            chunk = text.encode()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

        async with aclosing(self.events) as events:
            try:
                async for word, body in events:
                    await say(f"event: {word}\ndata: {json.dumps(body)}\n\n")
            except Declined as declined:
                await say(f"event: error\ndata: {json.dumps(self.decline(declined))}\n\n")
            except HungUp:
                return
        await send({"type": "http.response.body", "body": b""})

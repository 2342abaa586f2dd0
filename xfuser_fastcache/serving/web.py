"""HTTP in front of the service: a thin layer, in a thread of rank 0."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Collection
from concurrent.futures import Future
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.serving.connections import Arrivals, BoundedProtocol
from xfuser_fastcache.serving.heads import HeadCheck
from xfuser_fastcache.serving.requests import Limits, RequestRefused, order_of, read_request
from xfuser_fastcache.serving.service import (
    Answer,
    GenerationFailed,
    QueueFull,
    Service,
    Stopping,
)

_OPTIONS_BYTES = 1 << 16
_CHARACTER_BYTES = 12  # of JSON, where each half of a character beyond 16 bits is \\uXXXX
_CONNECTIONS = 512
# How long an answer may lie untaken, in milliseconds.
_UNTAKEN_MS = 30_000
_TO_NOBODY = Response(status_code=499)


def make_app(
    service: Service,
    limits: Limits,
    defaults: dict[str, Any],
    own: CacheConfig | None,
    about: dict[str, Any],
    request_timeout_s: float,
    hosts: Collection[str],
) -> FastAPI:
    """Return the application.

    Args:
        service: takes the orders.
        limits: of this service.
        defaults: the service's flags, for fields that a request leaves out.
        own: the service's cache, or None.
        about: what GET /health says of model and layout.
        request_timeout_s: longest that a client waits for its picture, in seconds.
        hosts: names that it answers to.
    """
    app = FastAPI(title="xfuser-fastcache", openapi_url=None)

    def refused(status: int, reason: str, **headers: str) -> JSONResponse:
        return JSONResponse({"detail": reason}, status, headers=headers)

    app.add_middleware(
        HeadCheck,
        hosts=hosts,
        max_bytes=_OPTIONS_BYTES + 2 * _CHARACTER_BYTES * limits.max_prompt_length,
        on_refusal=lambda: service.meters.count("refused"),
    )

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        try:
            order = order_of(read_request(await request.body()), limits, defaults, own)
        except ClientDisconnect:
            service.meters.count("hung_up")
            return _TO_NOBODY
        except RequestRefused as error:
            service.meters.count("refused")
            return refused(422, str(error))
        try:
            answer = service.submit(order)
            drawn = await answer_to(request, answer, request_timeout_s)
        except RequestRefused as error:
            return refused(422, str(error))
        except QueueFull as error:
            return refused(429, str(error), **{"Retry-After": str(error.retry_after_s)})
        except (Stopping, GenerationFailed) as error:
            return refused(503, str(error))
        except HungUp:
            service.meters.count("hung_up")
            return _TO_NOBODY
        except asyncio.TimeoutError:
            service.meters.count("timed_out")
            began = "it is still being drawn" if answer.running() else "its turn did not come"
            return refused(504, f"no picture within {request_timeout_s:g} s: {began}")
        if "image/png" in request.headers.get("accept", ""):
            return Response(drawn.picture, media_type="image/png", headers=headers_of(drawn))
        return JSONResponse(
            {
                "image": base64.b64encode(drawn.picture).decode(),
                "seed": drawn.order["seed"],
                "height": drawn.order["height"],
                "width": drawn.order["width"],
                "num_inference_steps": drawn.order["num_inference_steps"],
                "seconds": drawn.seconds,
                "waited_s": drawn.waited_s,
                "statistics": drawn.statistics,
            }
        )

    @app.get("/health")
    async def health() -> JSONResponse:
        ending = service.broken or service.stop.reason
        state = {"status": "stopping" if ending else "ok", **about}
        return JSONResponse(state, 503 if ending else 200)

    @app.get("/statistics")
    async def statistics() -> JSONResponse:
        return JSONResponse(service.meters.statistics())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.meters.exposition(), media_type=CONTENT_TYPE_LATEST)

    return app


class HungUp(Exception):
    """The client has ended its connection."""


async def answer_to(request: Request, answer: Future[Answer], limit_s: float) -> Answer:
    """Wait for an answer as long as somebody waits for it; then its turn is given up.

    Raises:
        HungUp: the client is gone.
        asyncio.TimeoutError: no answer within `limit_s` seconds.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    drawn, gone = asyncio.wrap_future(answer), asyncio.create_task(hung_up())
    either: set[asyncio.Future[Any]] = {drawn, gone}
    try:
        await asyncio.wait(either, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if drawn.done():
            return drawn.result()
        raise HungUp if gone.done() else asyncio.TimeoutError
    finally:
        drawn.cancel()
        gone.cancel()


def headers_of(drawn: Answer) -> dict[str, str]:
    """Return what an answer that is only a picture says beside it; the blocks are left out."""
    brief = {name: value for name, value in drawn.statistics.items() if name != "blocks"}
    return {
        "X-Seed": str(drawn.order["seed"]),
        "X-Seconds": f"{drawn.seconds:.3f}",
        "X-Statistics": json.dumps(brief),
    }


def listen(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded.

    Raises:
        OSError: naming the address and what to do.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        door = socket.create_server((host, port), family=family)
        door.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNTAKEN_MS)
        return door
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error}. Choose another --host or --port"
        ) from error


class WebServer:
    """uvicorn in a thread, which leaves signals to the main thread.

    Args:
        app: answers.
        door: see `listen`.
        read_timeout_s: longest that a request may take to arrive, in seconds.

    Attributes:
        address: where it answers, as a URL.
    """

    def __init__(self, app: FastAPI, door: socket.socket, read_timeout_s: float):
        protocol: Any = partial(BoundedProtocol, arrivals=Arrivals(_CONNECTIONS, read_timeout_s))
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            timeout_graceful_shutdown=10,
            access_log=False,
        )
        host, port = door.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [door]}, name="serve-web", daemon=True
        )
        self.thread.start()

    def close(self) -> None:
        """Let running answers leave, at most ten seconds long, and end."""
        self.server.should_exit = True
        self.thread.join(15)

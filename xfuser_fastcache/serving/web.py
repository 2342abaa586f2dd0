"""HTTP in front of the service: a thin layer, in a thread of rank 0."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.serving.requests import GenerateRequest, Limits, RequestRefused, order_of
from xfuser_fastcache.serving.service import Answer, QueueFull, Service, Stopping

_MAX_BODY_BYTES = 1 << 20


def make_app(
    service: Service,
    limits: Limits,
    defaults: dict[str, Any],
    own: CacheConfig | None,
    about: dict[str, Any],
    request_timeout_s: float,
) -> FastAPI:
    """Return the application.

    Args:
        service: takes the orders.
        limits: of this service.
        defaults: the service's flags, for fields that a request leaves out.
        own: the service's cache, or None.
        about: what GET /health says of model and layout.
        request_timeout_s: longest that a client waits for its picture, in seconds.
    """
    app = FastAPI(title="xfuser-fastcache", docs_url=None, redoc_url=None)

    def refused(status: int, reason: str, **headers: str) -> JSONResponse:
        return JSONResponse({"detail": reason}, status, headers=headers)

    @app.middleware("http")
    async def small_bodies(request: Request, go_on: Any) -> Response:
        size = request.headers.get("content-length", "")
        if request.method == "POST" and not (size.isdecimal() and int(size) <= _MAX_BODY_BYTES):
            service.meters.count("refused")
            return refused(413, f"a body must say its length, of at most {_MAX_BODY_BYTES} bytes")
        return await go_on(request)

    @app.exception_handler(RequestValidationError)
    async def wrong_field(request: Request, error: RequestValidationError) -> JSONResponse:
        service.meters.count("refused")
        return refused(422, "; ".join(map(said, error.errors())))

    @app.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> Response:
        try:
            order = order_of(body, limits, defaults, own)
        except RequestRefused as error:
            service.meters.count("refused")
            return refused(422, str(error))
        try:
            answer = service.submit(order)
            drawn = await asyncio.wait_for(asyncio.wrap_future(answer), request_timeout_s)
        except RequestRefused as error:
            return refused(422, str(error))
        except QueueFull as error:
            return refused(429, str(error), **{"Retry-After": str(error.retry_after_s)})
        except Stopping as error:
            return refused(503, str(error))
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


def said(wrong: Any) -> str:
    """Return one of pydantic's complaints in words: the field, what is allowed, what was given."""
    if wrong["type"] == "json_invalid":
        return f"the body is not valid JSON: {wrong['ctx']['error']}"
    name = ".".join(map(str, wrong["loc"][1:])) or "body"
    if wrong["type"] == "extra_forbidden":
        return f"unknown field {name!r}; known: {', '.join(GenerateRequest.model_fields)}"
    if wrong["type"] == "missing":
        return f"{name} is needed"
    return f"{name}: {wrong['msg']}, given {wrong['input']!r:.80}"


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
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error}. Choose another --host or --port"
        ) from error


class WebServer:
    """uvicorn in a thread, which leaves signals to the main thread.

    Attributes:
        address: where it answers, as a URL.
    """

    def __init__(self, app: FastAPI, door: socket.socket):
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=10, access_log=False
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

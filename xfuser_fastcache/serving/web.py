"""HTTP in front of the service: a thin layer, in a thread of rank 0."""

from __future__ import annotations

import base64
import dataclasses
import json
import socket
import threading
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from xfuser_fastcache.serving.connections import Arrivals, BoundedProtocol
from xfuser_fastcache.serving.desk import Desk, Events, HungUp
from xfuser_fastcache.serving.heads import HeadCheck
from xfuser_fastcache.serving.openai import images_door
from xfuser_fastcache.serving.page import page_door
from xfuser_fastcache.serving.refusals import Declined, refused
from xfuser_fastcache.serving.requests import MEDIA, GenerateRequest
from xfuser_fastcache.serving.service import Answer, Job

_OPTIONS_BYTES = 1 << 16
_CHARACTER_BYTES = 12  # of JSON, where each half of a character beyond 16 bits is \\uXXXX
_CONNECTIONS = 512
# How long an answer may lie untaken, in milliseconds.
_UNTAKEN_MS = 30_000


def make_app(desk: Desk, about: dict[str, Any], hosts: Collection[str]) -> FastAPI:
    """Return the application.

    Args:
        desk: takes the requests.
        about: what GET /health says of model and layout.
        hosts: names that it answers to.
    """
    app = FastAPI(title="xfuser-fastcache", openapi_url=None)
    service, limits = desk.service, desk.limits
    app.include_router(images_door(desk, about["model"]))
    app.include_router(page_door())
    fields = ("height", "width", "num_inference_steps", "guidance_scale")
    asked = {"defaults": {name: desk.defaults.get(name) for name in fields}}
    about = {**about, **asked, "limits": dataclasses.asdict(limits)}
    app.add_middleware(
        HeadCheck,
        hosts=hosts,
        max_bytes=_OPTIONS_BYTES + 2 * _CHARACTER_BYTES * limits.max_prompt_length,
        on_refusal=lambda: service.meters.count("refused"),
    )

    @app.exception_handler(Declined)
    async def declined(request: Request, why: Declined) -> Response:
        return refused(request.url.path, why)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, why: HTTPException) -> Response:
        answer = refused(request.url.path, Declined(why.status_code, why.detail))
        answer.headers.update(why.headers or {})
        return answer

    @app.exception_handler(HungUp)
    async def hung_up(request: Request, _: HungUp) -> Response:
        return Response(status_code=499)  # to nobody

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        asked = await desk.read(request, GenerateRequest)
        accepted = request.headers.get("accept", "")
        bare = [form for form in limits.formats if MEDIA[form] in accepted]
        if bare and asked.output_format not in (None, *bare):
            raise desk.refusal(
                f"output_format={asked.output_format!r} and Accept: {accepted:.80} contradict; "
                "give one of them",
                "output_format",
            )
        if bare:
            form = asked.output_format or bare[0]
            asked = asked.model_copy(update={"output_format": form})
        jobs = desk.submit([asked])
        if asked.stream or "text/event-stream" in accepted:
            return Events(_events(desk, request, jobs), _error_of)
        (drawn,) = await desk.answers(request, jobs)
        if bare:
            kind = MEDIA[drawn.order["output_format"]]
            return Response(drawn.picture, media_type=kind, headers=headers_of(drawn))
        return JSONResponse(body_of(drawn))

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


async def _events(
    desk: Desk, request: Request, jobs: list[Job]
) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    async with aclosing(desk.news(request, jobs)) as news:
        async for _, word, body in news:
            yield word, body
    (drawn,) = desk.results(jobs)
    yield "done", body_of(drawn)


def _error_of(why: Declined) -> dict[str, Any]:
    return {"status": why.status, "detail": why.reason}


def body_of(drawn: Answer) -> dict[str, Any]:
    """Return the answer to a request as JSON."""
    return {
        "image": base64.b64encode(drawn.picture).decode(),
        "output_format": drawn.order["output_format"],
        "seed": drawn.order["seed"],
        "height": drawn.order["height"],
        "width": drawn.order["width"],
        "num_inference_steps": drawn.order["num_inference_steps"],
        "seconds": drawn.seconds,
        "waited_s": drawn.waited_s,
        "statistics": drawn.statistics,
        "decisions": drawn.decisions,
    }


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

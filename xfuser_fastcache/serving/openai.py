"""OpenAI's images API in front of the desk: its fields, its answers, its events."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from xfuser_fastcache.serving.desk import Desk, Events
from xfuser_fastcache.serving.refusals import Declined
from xfuser_fastcache.serving.requests import GenerateRequest
from xfuser_fastcache.serving.service import Answer, Job

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
_SEEDS = 2**63


class OpenAIRequest(GenerateRequest):
    """Our fields, and those that all of OpenAI's requests for pictures have."""

    model: str | None = None
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto")
    user: str | None = Field(None, max_length=512, description="of the client; not used")

    def sized(self) -> GenerateRequest:
        """Return it with `size` as height and width.

        Raises:
            ValueError: no size, or the picture's size said twice.
        """
        if self.size in (None, "auto"):
            return self
        if self.height is not None or self.width is not None:
            raise ValueError("size and height or width are given; give one of them")
        found = _SIZE.fullmatch(self.size or "")
        if found is None:
            raise ValueError(f"size={self.size!r:.80} is not allowed; give WIDTHxHEIGHT or auto")
        return self.model_copy(update={"width": int(found[1]), "height": int(found[2])})


class ImagesRequest(OpenAIRequest):
    """Body of POST /v1/images/generations."""

    n: int = Field(1, ge=1, le=10)
    response_format: Literal["b64_json"] = "b64_json"
    background: Literal["auto", "opaque"] = "auto"


def wanted_of(request: ImagesRequest) -> list[GenerateRequest]:
    """Return a request a picture: the seeds are `seed`, `seed + 1`, ...

    Raises:
        ValueError: as of `OpenAIRequest.sized`.
    """
    one, seed = request.sized(), request.seed
    if seed is None:
        return [one] * request.n
    seeds = [(seed + index) % _SEEDS for index in range(request.n)]
    return [one.model_copy(update={"seed": seed}) for seed in seeds]


def ours(drawn: Answer) -> dict[str, Any]:
    """Return what OpenAI's answers have no place for."""
    return {
        "seed": drawn.order["seed"],
        "num_inference_steps": drawn.order["num_inference_steps"],
        "seconds": drawn.seconds,
        "waited_s": drawn.waited_s,
        "statistics": drawn.statistics,
        "decisions": drawn.decisions,
    }


def _common(drawn: Answer) -> dict[str, Any]:
    size = f"{drawn.order['width']}x{drawn.order['height']}"
    return {"size": size, "output_format": drawn.order["output_format"], "background": "opaque"}


def _encoded(drawn: Answer) -> str:
    return base64.b64encode(drawn.picture).decode()


def images_door(desk: Desk, model: str) -> APIRouter:
    """Return the routes /v1/models and /v1/images/generations.

    Args:
        desk: takes the requests.
        model: name of the only one that is served.
    """
    door = APIRouter(prefix="/v1")
    born = int(time.time())

    @door.get("/models")
    async def models() -> JSONResponse:
        known = {"id": model, "object": "model", "created": born, "owned_by": "xfuser-fastcache"}
        return JSONResponse({"object": "list", "data": [known]})

    @door.post("/images/generations")
    async def generations(request: Request) -> Response:
        asked = await desk.read(request, ImagesRequest)
        refuse_other_models(desk, asked, model)
        try:
            wanted = wanted_of(asked)
        except ValueError as error:
            raise desk.refusal(str(error), "size") from error
        if len(wanted) > desk.service.queue_size:
            raise desk.refusal(
                f"n={len(wanted)} is not allowed; give at most {desk.service.queue_size}, as many "
                "as may wait here",
                "n",
            )
        jobs = desk.submit(wanted)
        if asked.stream or "text/event-stream" in request.headers.get("accept", ""):
            return Events(_events(desk, request, jobs), Declined.openai)
        drawn = await desk.answers(request, jobs)
        data = [{"b64_json": _encoded(one), "fastcache": ours(one)} for one in drawn]
        return JSONResponse({"created": int(time.time()), "data": data, **_common(drawn[0])})

    return door


def refuse_other_models(desk: Desk, asked: OpenAIRequest, model: str) -> None:
    """Refuse a request for a model that is not served.

    Raises:
        Declined: naming the one that is.
    """
    if asked.model not in (None, model):
        desk.service.meters.count("refused")
        raise Declined(
            404,
            f"the model {asked.model!r:.80} does not exist; this service has {model!r}",
            field="model",
            code="model_not_found",
        )


async def _events(
    desk: Desk, request: Request, jobs: list[Job]
) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    async with aclosing(desk.news(request, jobs)) as news:
        async for index, word, body in news:
            kind = f"image_generation.{word}"
            yield kind, {"type": kind, "index": index, **body}
    for index, drawn in enumerate(desk.results(jobs)):
        kind = "image_generation.completed"
        yield (
            kind,
            {
                **{"type": kind, "index": index, "b64_json": _encoded(drawn)},
                **{"created_at": int(time.time()), **_common(drawn), "fastcache": ours(drawn)},
            },
        )

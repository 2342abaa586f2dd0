"""Random requests to a running service: each is drawn or refused with its reason, or leaves.

After each, the service draws its own picture as before, holds nothing, and has opened no file.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from xfuser_fastcache.chaos.service import (
    MAX_SIDE,
    MAX_STEPS,
    OWN,
    QUEUE_SIZE,
    READ_TIMEOUT_S,
    Answered,
    Broken,
    Target,
    target,
)
from xfuser_fastcache.chaos.trials import Verdict
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.config.checks import options_of
from xfuser_fastcache.config.methods import REGISTRIES
from xfuser_fastcache.plugins import GATES
from xfuser_fastcache.serving.requests import OPERATORS, GenerateRequest

# What JSON can hold and nobody should send.
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 5, 1.5, 0.5, 1e-300, 1e300, -1e300, 10**30, 10**400),
    *("", "x", "\ud800", "\0", "a" * 3000, "../..", "NaN", "${HOME}", "é\U0001f600"),
    *([], [1], [0, 1], [1, 0] * 2, [1] * 2000, [[1]], [None], ["x"]),
    *({}, {"name": "x"}, {"name": 1}, {"all_of": []}, {"a": {"b": {"c": [1]}}}),
)
# Numbers and words that checks of options let through now and then.
_NUMBERS = (*range(12), 50, 1000, 1e-9, 0.05, 0.3, 0.9, 1.5, 7.0, 100.0, 1e6, 1e12, 1e100, 1e200)
_LISTS = ([1], [1, 0, 1, 1], [0.1, 0.2], [1e200, 1e200], [4.98e2, -2.83e2, 5.58e1, -3.82, 0.264])
_NO_PICTURE = "the picture holds NaN or infinity"


def _plain(rng: random.Random) -> dict[str, Any]:
    """A request that is to be drawn."""
    return {
        "prompt": rng.choice(("a small green square", "ring " * rng.randint(1, 300), "\U0001f600")),
        "height": rng.randrange(16, MAX_SIDE + 1, 16),
        "width": rng.randrange(16, MAX_SIDE + 1, 16),
        "num_inference_steps": rng.randint(1, MAX_STEPS),
        "guidance_scale": rng.choice((0, 1, 3.5, 100)),
        "seed": rng.choice((0, 7, 2**63 - 1)),
        **rng.choice(({}, {"use_cache": False}, {"use_cache": rng.choice(list(GATES))})),
    }


def _fields(rng: random.Random) -> dict[str, Any]:
    """A request with odd values in its fields, or odd fields."""
    body = _plain(rng)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice((*GenerateRequest.model_fields, "heigth", "\ud800", ""))
        body[name] = rng.choice(_ODD)
    return body


def _value(rng: random.Random, found: Any) -> Any:
    """A value for an option: mostly one that its check lets through, to fail later if it can."""
    words = (
        *re.findall(r"\w+", found.metadata["allowed"]),
        *_NUMBERS,
        *_LISTS,
        True,
        False,
        {"0.1": 3},
    )
    if rng.random() < 0.3:
        return rng.choice(_ODD)
    return rng.choice([word for word in words if _passes(found, word)] or _ODD)


def _passes(found: Any, value: Any) -> bool:
    try:
        found.metadata["check"].read(value)
    except (TypeError, ValueError):
        return False
    return True


def _method(rng: random.Random, kind: str, depth: int = 0) -> Any:
    """A method by name, or with options, or combined."""
    registry = REGISTRIES[kind]
    name = rng.choice(list(registry))
    if rng.random() < 0.5:
        return name
    if kind == "gate" and depth < 3 and rng.random() < 0.4:
        parts = [_method(rng, kind, depth + 1) for _ in range(rng.randint(1, 3))]
        return {rng.choice(("all_of", "any_of")): parts}
    options = options_of(registry[name])
    if not options:
        return {"name": name}
    option = rng.choice(list(options))
    return {"name": name, option: _value(rng, options[option])}


def _options(rng: random.Random) -> dict[str, Any]:
    """A request with a cache of its own, some of whose options are odd."""
    backend = rng.choice(list(GATES))
    taken = [name for name in options_of(GATES[backend]) if name in options_of(CacheConfig)]
    config: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        # Most options belong to one method; those of the backend at hand are tried most.
        name = rng.choice(taken if taken and rng.random() < 0.4 else list(options_of(CacheConfig)))
        is_method = name in REGISTRIES and rng.random() < 0.9
        config[name] = (
            _method(rng, name) if is_method else _value(rng, options_of(CacheConfig)[name])
        )
    return {**_plain(rng), "use_cache": backend, "cache_config": config}


def _file(rng: random.Random, name: str) -> dict[str, Any]:
    """A request that names a file, in an option that could hold a name or in one that could not."""
    option = rng.choice((*OPERATORS, "calibration", "linear_maps", *options_of(CacheConfig)))
    value = rng.choice((name, [name], {"name": name}, {"name": "Fast", "table": name}))
    return {**_plain(rng), "use_cache": "Fast", "cache_config": {option: value}}


def _body(rng: random.Random) -> bytes:
    """Bytes that are nearly a body."""
    body = json.dumps(_plain(rng) | {"cache_config": {"cache_ratio_threshold": 0.1}}).encode()
    place = rng.randrange(len(body))
    return rng.choice(
        (
            body[:place],
            body[:place] + rng.randbytes(rng.randint(1, 4)) + body[place + 1 :],
            body[:place] + b"\xff" + body[place:],
            body[:-1] + b', "prompt": "again"}',
            body[:-1] + b', "seed": ' + rng.choice((b"NaN", b"1e999", b"01", b"9" * 5000)) + b"}",
            body[:-1] + b', "cache_config": ' + b"[" * 50 + b"]" * 50 + b"}",
            b"[" * rng.randint(1, 50_000),
            b"\xef\xbb\xbf" + body,
            body.decode().encode("utf-16"),
            b" " * 200_000 + body,
            b"",
            b"null",
        )
    )


_HEADS: tuple[tuple[dict[str, str], set[int]], ...] = (
    ({"Host": "evil.example"}, {421}),
    ({"Host": "localhost.evil.example:80"}, {421}),
    ({"Origin": "http://evil.example"}, {403}),
    ({"Origin": "null"}, {403}),
    ({"Sec-Fetch-Site": "cross-site"}, {403}),
    ({"Content-Type": "text/plain"}, {415}),
    ({"Content-Type": ""}, {415}),
    ({"Content-Type": "multipart/form-data; boundary=x"}, {415}),
    ({"Content-Length": "9" * 30}, {0, 400, 413}),
    ({"Content-Length": "-1"}, {0, 400, 413}),
    ({"Transfer-Encoding": "chunked"}, {0, 400, 413}),
    ({"X-Long": "a" * 100_000}, {0, 200, 400}),  # as it arrives in one piece or in several
    ({"Upgrade": "websocket", "Connection": "Upgrade"}, {200}),
    ({"Expect": "100-continue"}, {200}),
    ({"X-Odd": "\xe9" * 100}, {200}),
)


def _head(body: bytes, length: int | None = None) -> bytes:
    return (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length)
    )


def _leave(rng: random.Random, service: Target) -> str:
    """Connections that do not end as they should; returns what they did."""
    whole = json.dumps(_plain(rng)).encode()
    cut = rng.randrange(len(whole))
    words = {
        "silent": b"",
        "half a head": _head(whole)[: rng.randrange(1, 60)],
        "half a body": _head(whole) + whole[:cut],
        "garbage": rng.randbytes(rng.randint(1, 3000)),
        "hang up": _head(whole) + whole,
        "too much": _head(b"", 10**6) + whole,
    }
    kind = rng.choice(list(words))
    ends = [service.say(words[kind]) for _ in range(rng.randint(1, 2 * QUEUE_SIZE))]
    waits = kind != "hang up" and rng.random() < 0.2
    for end in ends:
        if waits:
            end.settimeout(READ_TIMEOUT_S + 20)
            while end.recv(1 << 16):  # until the service ends it
                pass
        elif rng.random() < 0.5:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        end.close()
    return f"{len(ends)} x {kind}{', held' if waits else ''}"


def _judge(sent: str, answer: Answered, allowed: set[int]) -> str:
    """Return how a request ended.

    Raises:
        Broken: not as is allowed.
    """
    if answer.status == 503 and _NO_PICTURE in answer.detail:
        return "no picture"
    if answer.status not in allowed:
        raise Broken(f"{sent} was answered with {answer.status}: {answer.detail}")
    if answer.status != 200:
        if answer.status and not answer.detail:
            raise Broken(f"{sent} was refused with {answer.status} and no reason")
        return "refused"
    drawn = answer.body
    if answer.kind == "text/event-stream":
        word, said = _last_event(drawn)
        if word != "done":
            error = Answered(said["status"], json.dumps(said).encode(), "application/json")
            return _judge(sent, error, allowed)
        drawn = base64.b64decode(said["image"])
    elif answer.kind != "image/png":
        raise Broken(f"{sent} was answered with {answer.detail}")
    with Image.open(io.BytesIO(drawn)) as picture:
        if all(least == most for least, most in picture.convert("RGB").getextrema()):
            raise Broken(f"{sent} drew one colour")
    return "drawn"


def _last_event(stream: bytes) -> tuple[str, dict[str, Any]]:
    word, data = stream.decode().strip().rpartition("\n\n")[2].splitlines()
    return word.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def _json(rng: random.Random, service: Target, make: Callable[[random.Random], Any]) -> str:
    body = make(rng)
    sent = json.dumps(body)
    return _judge(sent[:400], service.post(sent.encode()), {200, 422})


def _try_files(rng: random.Random, service: Target) -> str:
    """A file that is there and one that is not get the same answer."""
    draws = rng.getstate()
    answers = []
    there = rng.choice(("file", "fifo", "folder"))
    for name in (there, "x" * len(there)):
        rng.setstate(draws)
        path = str(service.folder / name)
        body = json.dumps(_file(rng, path))
        answer = service.post(body.encode())
        _judge(body[:400], answer, {422})
        answers.append(answer.detail.replace(path, "PATH"))
    if answers[0] != answers[1]:
        raise Broken(f"a file that is there is told from one that is not: {answers}")
    return "refused"


def _try_heads(rng: random.Random, service: Target) -> str:
    headers, allowed = rng.choice(_HEADS)
    return _judge(f"{headers!r:.200}", service.post(json.dumps(OWN).encode(), **headers), allowed)


def _try_paths(rng: random.Random, service: Target) -> str:
    method = rng.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "X"))
    path = rng.choice(("/generate", "/", "/../../etc/passwd", "/%2e%2e/%00", "//", "/docs", "*"))
    answer = service.send(method, path, None, {})
    if method == "HEAD":  # has no body to say why
        return "refused"
    if (method, path, answer.status, answer.kind) == ("GET", "/", 200, "text/html"):
        return "the page"
    return _judge(f"{method} {path}", answer, {400, 404, 405, 413, 415})


def _try_bodies(rng: random.Random, service: Target) -> str:
    body = _body(rng)
    return _judge(f"{body[:300]!r}", service.post(body), {0, 200, 413, 422})


_KINDS: dict[str, Callable[[random.Random, Target], str]] = {
    "plain": lambda rng, service: _judge(
        "a plain request", service.post(json.dumps(_plain(rng)).encode()), {200}
    ),
    "fields": lambda rng, service: _json(rng, service, _fields),
    "options": lambda rng, service: _json(rng, service, _options),
    "files": _try_files,
    "heads": _try_heads,
    "paths": _try_paths,
    "bodies": _try_bodies,
    "connections": _leave,
}
_WEIGHTS = (1, 3, 5, 3, 2, 1, 3, 2)


def trial(seed: int) -> Verdict:
    """Send one request, or a few that do not end, and see that the service is as it was."""
    rng = random.Random(seed)
    (kind,) = rng.choices(list(_KINDS), _WEIGHTS)
    service = target()
    started = time.monotonic()
    try:
        ending = _KINDS[kind](rng, service)
        service.check()
    except (Broken, OSError) as error:
        service.end()
        target.cache_clear()
        return Verdict(seed, kind, False, "broken", str(error), time.monotonic() - started)
    if kind == "connections":
        return Verdict(seed, kind, True, "left", ending, time.monotonic() - started)
    return Verdict(seed, kind, True, ending, "", time.monotonic() - started)

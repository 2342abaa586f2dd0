"""What reaches a service: heads, bodies, connections that do not end. One process, no model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from support.doors import READ_S, Door, eventually

from xfuser_fastcache.serving.heads import LOOPBACK, refusal_of

JSON = {"content-type": "application/json", "content-length": "2"}


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    found = Door()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, None),
        ({"host": "localhost"}, None),
        ({"host": "[::1]:8000"}, None),
        ({"host": "LOCALHOST:8000"}, None),
        ({"host": "evil.example:8000"}, 421),
        ({"host": "localhost.evil.example"}, 421),
        ({"host": "127.0.0.1@evil.example"}, 421),
        ({"host": "[::1"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://127.0.0.1:8000"}, None),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-origin"}, None),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "application/json; charset=utf-8"}, None),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "text/plain; application/json"}, 415),
        ({"content-type": ""}, 415),
        ({"content-length": "101"}, 413),
        ({"content-length": "-1"}, 413),
        ({"content-length": "1_0"}, 413),
        ({"content-length": "9" * 5000}, 413),
        ({"content-length": "\N{ARABIC-INDIC DIGIT TWO}"}, 413),
    ],
)
def test_a_head_is_refused_for_one_reason(headers: dict[str, str], status: int | None) -> None:
    head = {"host": "127.0.0.1:8000", **JSON, **headers}
    refusal = refusal_of("POST", head, LOOPBACK, 100)
    assert (refusal and refusal.status) == status
    if status == 421:
        assert refusal_of("GET", head, LOOPBACK, 100) == refusal
        assert "--allowed_hosts" in refusal.reason
    else:
        assert refusal_of("GET", head, LOOPBACK, 100) is None


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "pictures.lan"}, 422),
        ({"Origin": "http://evil.example"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": ""}, 415),
    ],
)
def test_heads_are_checked_before_bodies(door: Door, headers: dict[str, str], status: int) -> None:
    before = door.outcome("refused")
    answer = door.client.post(
        "/generate", content=b"{}", headers={"Content-Type": "application/json", **headers}
    )
    assert answer.status_code == status
    assert answer.json()["detail"]
    assert door.outcome("refused") == before + 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not valid JSON: "),
        (b"\xff\xfe", "the body is not valid JSON: "),
        (b"[]", "body: Input should be"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is given more than once"),
        (b'{"prompt": "a", "cache_config": {"a": 1, "a": 1}}', "'a' is given more than once"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "NaN is not allowed; give finite numbers"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "1e999 is not allowed; give finite"),
        (b'{"prompt": "a", "guidance_scale": 1%b}' % (b"0" * 400), "guidance_scale: "),
        (b'{"prompt": "a", "seed": 1%b}' % (b"0" * 5000), "the body is not valid JSON: "),
        (b'{"prompt": "a", "seed": -1}', "seed: Input should be greater"),
        (b'{"prompt": "\\ud800"}', "prompt: Input should be a valid string"),
        (b'{"prompt": "a", "\\ud800": 1}', "body: Input should be a valid string"),
        (b"{" + b", ".join(b'"%d": 1' % i for i in range(5000)) + b"}", "; and 4998 more"),
        (b'{"prompt": "a", "cache_config": ' + b"[" * 17 + b"]" * 17 + b"}", "deeper than 16"),
        (b"[" * 60_000, "deeper than 16"),
    ],
)
def test_a_body_is_refused_with_its_reason(door: Door, body: bytes, message: str) -> None:
    answer = door.client.post(
        "/generate", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    assert message in answer.json()["detail"]
    assert len(answer.json()["detail"]) < 500


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"POST /generate HTT",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
    ],
)
def test_a_request_that_does_not_arrive_is_ended(door: Door, words: bytes) -> None:
    """Half of one, or a byte now and then: the limit is on all of it."""
    ends = [door.say(words) for _ in range(3)]
    started = time.monotonic()
    answers = []
    for end in ends:
        answer = b""
        while heard := end.recv(65536):
            answer += heard
        answers.append(answer)
        end.close()
    assert 0.5 * READ_S < time.monotonic() - started < READ_S + 2
    assert all(b"408 Request Timeout" in answer for answer in answers)
    assert all(b"the request did not arrive within 1.5 s" in answer for answer in answers)


def test_a_trickle_is_no_arrival(door: Door) -> None:
    end = door.say(b"POST /generate HTTP/1.1\r\n")
    started = time.monotonic()
    with pytest.raises(OSError):
        while time.monotonic() - started < 10:
            end.sendall(b"X-A: b\r\n")
            time.sleep(0.05)
    assert time.monotonic() - started < READ_S + 2
    end.close()


def test_more_connections_than_are_held_end_the_oldest_idle_ones(door: Door) -> None:
    ends = [door.say(b"") for _ in range(700)]
    assert door.client.get("/health").status_code == 200
    assert door.held() <= 512
    for end in ends:
        end.close()
    assert eventually(lambda: door.held() <= 1)


def test_a_client_that_hangs_up_frees_its_place(door: Door) -> None:
    """Nobody draws here, so what is in the queue stays there until it is given up."""
    body = b'{"prompt": "a"}'
    post = (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body
    left = door.outcome("hung_up")
    ends = [door.say(post) for _ in range(2)]
    meters = door.service.meters
    assert eventually(lambda: meters.statistics()["waiting"] == 2)
    full = door.client.post("/generate", json={"prompt": "a"})
    assert full.status_code == 429
    ends[0].close()
    assert eventually(lambda: meters.statistics()["waiting"] == 1)
    assert len(door.service._waiting) == 1
    with ThreadPoolExecutor(1) as clients:
        third = clients.submit(door.client.post, "/generate", json={"prompt": "a"}, timeout=1)
        assert eventually(lambda: meters.statistics()["waiting"] == 2)
        with pytest.raises(httpx.ReadTimeout):  # it waits, and gives up
            third.result()
    ends[1].close()
    assert eventually(lambda: meters.statistics()["waiting"] == 0)
    assert eventually(lambda: door.outcome("hung_up") == left + 3)

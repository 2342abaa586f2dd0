"""OpenAI's images API in front of the queue, and server-sent events. One process, no model."""

from __future__ import annotations

import base64
import io
import runpy
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.doors import LedDoor, events, eventually
from support.worlds import ROOT

IMAGES = "/v1/images/generations"


@pytest.fixture(scope="module")
def door() -> Iterator[LedDoor]:
    found = LedDoor(queue_size=3)
    yield found
    found.close()


@pytest.fixture
def free(door: LedDoor) -> Iterator[LedDoor]:
    """Draws as soon as it is asked."""
    door.painter.free = True
    yield door
    door.painter.free = False


def picture(encoded: str) -> tuple[tuple[int, int], Any]:
    """Size, and the colour of a corner."""
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as found:
        return found.size, found.getpixel((0, 0))


def test_images_are_those_of_generate(free: LedDoor) -> None:
    asked = {"prompt": "a", "num_inference_steps": 3, "seed": 7}
    own = free.client.post("/generate", json={**asked, "width": 96, "height": 64}).json()
    answer = free.client.post(IMAGES, json={**asked, "size": "96x64", "user": "me", "n": 1})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    (one,) = body["data"]
    assert one["b64_json"] == own["image"]
    assert picture(one["b64_json"]) == ((96, 64), (7, 0, 0))
    assert body["size"] == "96x64" and body["created"] > 1.7e9
    assert one["fastcache"]["seed"] == 7
    assert one["fastcache"]["statistics"] == own["statistics"]
    first, second = free.painter.drawn[-2:]
    assert first == second


def test_several_images_have_seeds_in_a_row_or_drawn(free: LedDoor) -> None:
    answer = free.client.post(IMAGES, json={"prompt": "a", "n": 3, "seed": 2**63 - 1}).json()
    seeds = [one["fastcache"]["seed"] for one in answer["data"]]
    assert seeds == [2**63 - 1, 0, 1]
    assert [picture(one["b64_json"])[1][0] for one in answer["data"]] == [255, 0, 1]
    answer = free.client.post(IMAGES, json={"prompt": "a", "n": 2, "size": "auto"}).json()
    assert len({one["fastcache"]["seed"] for one in answer["data"]}) == 2


@pytest.mark.parametrize(
    ("body", "status", "field", "message"),
    [
        ({}, 400, "prompt", "prompt is needed"),
        ({"style": "vivid"}, 400, "style", "unknown field 'style'; known: prompt, negative"),
        ({"n": 0}, 400, "n", "n: Input should be greater"),
        ({"n": 4}, 400, "n", "n=4 is not allowed; give at most 3, as many as may wait here"),
        ({"n": 11}, 400, "n", "n: Input should be less"),
        ({"size": "big"}, 400, "size", "size='big' is not allowed; give WIDTHxHEIGHT or auto"),
        ({"size": "64x64\n"}, 400, "size", "size='64x64\\n' is not allowed"),
        ({"size": "64x64", "height": 64}, 400, "size", "size and height or width are given"),
        ({"size": "1024x1024"}, 400, "height", "height=1024 is not allowed; give a multiple of 16"),
        ({"size": "64x100"}, 400, "height", "height=100 is not allowed"),
        ({"height": 100}, 400, "height", "height=100 is not allowed"),
        ({"num_inference_steps": 9}, 400, "num_inference_steps", "give 1 to 8"),
        ({"response_format": "url"}, 400, "response_format", "Input should be 'b64_json', given"),
        ({"output_format": "webp"}, 400, "output_format", "is not allowed; this service gives png"),
        ({"model": "dall-e-3"}, 404, "model", "the model 'dall-e-3' does not exist; this service"),
        (
            {"use_cache": "Fast", "cache_config": {"calibration": "/etc/hostname"}},
            400,
            None,
            "calibration='/etc/hostname' is not allowed; it is set by whoever runs this service",
        ),
    ],
)
def test_errors_have_openais_form(
    door: LedDoor, body: dict[str, Any], status: int, field: str | None, message: str
) -> None:
    before = door.outcome("refused")
    answer = door.client.post(IMAGES, json={**({"prompt": "a"} if body else {}), **body})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert error["code"] == ("model_not_found" if status == 404 else None)
    assert door.outcome("refused") == before + 1
    assert not door.service.meters.statistics()["waiting"]


def test_what_heads_and_paths_refuse_has_openais_form_too(door: LedDoor) -> None:
    for path, headers, status in (
        (IMAGES, {"Host": "evil.example"}, 421),
        (IMAGES, {"Origin": "http://evil.example"}, 403),
        (IMAGES, {"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ("/v1/images/edits", {}, 404),
    ):
        headers = {"Content-Type": "application/json", **headers}
        answer = door.client.post(path, content=b'{"prompt": "a"}', headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.json()["error"]["message"]
    answer = door.client.get(IMAGES)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_a_model_has_a_name(door: LedDoor) -> None:
    (model,) = door.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("toys/flux", "model")


def test_all_images_of_a_request_wait_or_none(door: LedDoor) -> None:
    meters = door.service.meters
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(door.client.post, IMAGES, json={"prompt": "a", "n": 3})
        assert eventually(lambda: meters.statistics()["running"] == 1)
        assert eventually(lambda: meters.statistics()["waiting"] == 2)
        full = door.client.post(IMAGES, json={"prompt": "a", "n": 2})
        assert full.status_code == 429
        assert full.json()["error"]["code"] == "rate_limit_exceeded"
        assert full.json()["error"]["type"] == "rate_limit_error"
        assert int(full.headers["retry-after"]) >= 1
        assert meters.statistics()["waiting"] == 2
        door.painter.steps.release(12)
        assert len(first.result().json()["data"]) == 3


def test_a_failure_gives_up_the_other_images(free: LedDoor) -> None:
    before = len(free.painter.drawn)
    answer = free.client.post(IMAGES, json={"prompt": "fail", "n": 3})
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.json()["error"]["message"] == "this picture failed: RuntimeError: no"
    assert int(answer.headers["retry-after"]) >= 1
    assert eventually(lambda: not free.service.meters.statistics()["waiting"])
    assert 1 <= len(free.painter.drawn) - before <= 3


@pytest.mark.parametrize("way", ["body", "header"])
def test_a_stream_tells_every_step_as_it_is_done(door: LedDoor, way: str) -> None:
    body = {"prompt": "a", "seed": 5, "num_inference_steps": 4}
    headers = {} if way == "body" else {"Accept": "text/event-stream"}
    body |= {"stream": True} if way == "body" else {}
    with door.client.stream("POST", "/generate", json=body, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        seen = []
        for word, said in events(answer):
            if word == "progress":
                seen.append((said["step"], said["steps"], said["block_approx_ratio"]))
                door.painter.steps.release()  # the next one is not begun before this was read
            elif word == "done":
                done = said
            else:
                assert (word, said) == ("waiting", {"ahead": 0})
    assert seen[:4] == [(0, 4, 0.0), (1, 4, 0.0), (2, 4, 0.25), (3, 4, 0.5)]
    door.painter.free = True
    assert done["seed"] == 5
    assert done["image"] == door.client.post("/generate", json={**body, "stream": False}).json()[
        "image"
    ]  # fmt: skip
    door.painter.free = False
    while door.painter.steps.acquire(blocking=False):
        pass


def test_a_stream_says_how_many_are_ahead_and_a_hang_up_frees_the_place(door: LedDoor) -> None:
    meters, left = door.service.meters, door.outcome("hung_up")
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(door.client.post, "/generate", json={"prompt": "a"})
        assert eventually(lambda: meters.statistics()["running"] == 1)
        body = {"prompt": "b", "stream": True}
        with door.client.stream("POST", "/generate", json=body) as second:
            told = events(second)
            assert next(told) == ("waiting", {"ahead": 1})
            assert meters.statistics()["waiting"] == 1
        assert eventually(lambda: meters.statistics()["waiting"] == 0)
        assert eventually(lambda: door.outcome("hung_up") == left + 1)
        door.painter.steps.release(4)
        assert first.result().status_code == 200
    assert [order["prompt"] for order in door.painter.drawn][-1] == "a"


def test_a_stream_that_fails_says_so(free: LedDoor) -> None:
    for path, told in (
        ("/generate", {"status": 503, "detail": "this picture failed: RuntimeError: no"}),
        (IMAGES, {"error": {"message": "this picture failed: RuntimeError: no"}}),
    ):
        body = {"prompt": "fail", "stream": True}
        with free.client.stream("POST", path, json=body) as answer:
            *_, (word, said) = events(answer)
        assert word == "error"
        if "error" in said:
            assert said["error"].pop("type") == "server_error"
            assert (said["error"].pop("param"), said["error"].pop("code")) == (None, None)
        assert said == told


def test_images_are_streamed_in_openais_words(free: LedDoor) -> None:
    body = {"prompt": "a", "n": 2, "stream": True, "seed": 3}
    with free.client.stream("POST", IMAGES, json=body) as answer:
        found = list(events(answer))
    assert all(word == said["type"] for word, said in found)
    *_, first, second = found
    assert first[0] == second[0] == "image_generation.completed"
    assert [said["index"] for _, said in (first, second)] == [0, 1]
    assert picture(second[1]["b64_json"])[1] == (4, 0, 0)


def test_a_refused_stream_is_an_answer_not_a_stream(door: LedDoor) -> None:
    answer = door.client.post("/generate", json={"prompt": "a", "stream": True, "height": 100})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/json")


def test_the_example_draws_and_says_what_is_wrong(
    free: LedDoor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "draw.py"))["main"]
    words = ["draw.py", "a", str(tmp_path / "a.png"), "--seed", "7", "--url", free.web.address]
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "4"])
    assert example() == 0
    with Image.open(tmp_path / "a.png") as found:
        assert found.getpixel((0, 0)) == (7, 0, 0)
    assert "a.png: seed 7, " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "9"])
    assert example() == 1
    assert "num_inference_steps=9 is not allowed; give" in capsys.readouterr().err

"""`fastcache chaos --requests`: a few trials against a running service, and that they can fail."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xfuser_fastcache.chaos.requests import _judge, trial
from xfuser_fastcache.chaos.service import Answered, Broken, Opens, Target, target
from xfuser_fastcache.chaos.trials import counted, run_trials

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def running() -> Iterator[Target]:
    yield target()
    target().end()
    target.cache_clear()


def test_odd_requests_change_nothing(running: Target) -> None:
    verdicts = run_trials(trial, 30, seed=0)
    assert all(verdict.held for verdict in verdicts), counted(verdicts, "requests")
    assert {verdict.ending for verdict in verdicts} >= {"drawn", "refused", "left"}
    assert target() is running, "it was never started again"
    assert len({verdict.kind for verdict in verdicts}) > 5


def test_what_a_service_must_not_do_is_seen(running: Target) -> None:
    with pytest.raises(Broken, match="its own picture is another"):
        running.picture, kept = b"another", running.picture
        try:
            running.check()
        finally:
            running.picture = kept
    (running.folder / "file").read_text()
    with pytest.raises(Broken, match="a file that a request named was opened"):
        running.check()
    running.check()


def png(pixels: np.ndarray) -> Answered:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return Answered(200, file.getvalue(), "image/png")


def refused(status: int, detail: str) -> Answered:
    return Answered(status, json.dumps({"detail": detail}).encode(), "application/json")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answered(500, b"Internal Server Error", "text/plain"), "500: Internal Server Error"),
        (Answered(0), "answered with 0"),
        (refused(503, "this picture failed: OverflowError"), "503: this picture failed"),
        (refused(422, ""), "refused with 422 and no reason"),
        (png(np.zeros((8, 8, 3), np.uint8)), "drew one colour"),
    ],
)
def test_an_answer_that_must_not_be_is_told(answer: Answered, reason: str) -> None:
    with pytest.raises(Broken, match=reason):
        _judge("this request", answer, {200, 422})


def test_an_answer_that_may_be_is_sorted() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    assert _judge("this request", png(noise), {200}) == "drawn"
    assert _judge("this request", refused(422, "no"), {200, 422}) == "refused"
    nan = refused(503, "ValueError: the picture holds NaN or infinity; give other options")
    assert _judge("this request", nan, {200}) == "no picture"


def test_opening_is_seen_and_looking_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    opens = Opens(tmp_path)
    assert (tmp_path / "file").exists() and not opens.seen()
    (tmp_path / "file").read_text()
    assert opens.seen()
    assert not opens.seen()
    opens.close()

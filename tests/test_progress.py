"""Progress: whole lines in a file, objects in JSON, a bar on a terminal alone, and silence.

CPU, one process.
"""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from support.flux import STEPS, Flux

from xfuser_fastcache.cli.flags import flags_of, progress_flags, progress_of
from xfuser_fastcache.reports import progress as module
from xfuser_fastcache.reports.progress import STYLES, Progress
from xfuser_fastcache.xdit.generator import Generator


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(style: str, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a task of four steps shows that skips a half."""
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    with Progress(style, stream).task("drawing", 4, lambda: 0.5) as task:
        for _ in range(4):
            task.update()
    return stream.getvalue()


@pytest.mark.parametrize("style", ["auto", "lines"])
def test_a_file_gets_whole_lines(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(style, io.StringIO(), monkeypatch)
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    first, *between, last = text.splitlines()
    assert first == "drawing: 0 of 4"
    assert between[1].startswith("drawing: 2 of 4, 0 s, about 0 s left, 50% skipped")
    assert last == "drawing: 4 of 4, 0 s, 50% skipped"


def test_lines_come_now_and_then() -> None:
    stream = io.StringIO()
    assert list(Progress("lines", stream).track(range(1000), "many")) == list(range(1000))
    assert stream.getvalue().splitlines() == ["many: 0 of 1000", "many: 1000 of 1000, 0 s"]


def test_without_news_lines_are_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress("lines", stream).task("waiting", 2) as task:
        for second in range(130):
            now[0] = float(second)
            task.reach(0)
    said = stream.getvalue().splitlines()
    assert said[1:] == [f"waiting: 0 of 2, {second} s" for second in (60, 120, 129)]


def test_json_is_an_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.loads(x) for x in shown("json", io.StringIO(), monkeypatch).splitlines()]
    assert [line["done"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert lines[0]["left_s"] is None and "skipped" not in lines[0]
    assert lines[-1] == {**lines[-1], "what": "drawing", "of": 4, "ended": True, "skipped": 0.5}


def test_a_terminal_gets_a_bar_and_nothing_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown("none", Terminal(), monkeypatch) == ""
    bar = shown("auto", Terminal(), monkeypatch)
    assert "4/4" in bar and "50% skipped" in bar and "4 of 4" not in bar


def test_what_fails_says_how_far_it_came() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError):
        for number in Progress("lines", stream).track([1, 0, 2], "dividing"):
            1 // number
    assert stream.getvalue().splitlines()[-1] == "dividing: 1 of 3, 0 s"


def test_the_flags_say_which() -> None:
    def style(*arguments: str) -> str:
        flags = flags_of("x", None)
        progress_flags(flags)
        return flags.parse_args(arguments).progress

    assert style() == "auto" and style("--quiet") == "none"
    assert [style("--progress", name) for name in STYLES] == [*STYLES]
    assert progress_of(SimpleNamespace(progress="json")).style == "json"


@pytest.mark.parametrize("cached", [False, True])
def test_a_pipelines_loop_tells_its_steps_and_skips(
    cached: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flux, stream = Flux(), io.StringIO()
    flux.pipe.set_progress_bar_config(disable=False)
    generator = object.__new__(Generator)  # without xfuser, which has no part in it
    generator.pipe, generator.world = flux.pipe, SimpleNamespace(rank=0)
    generator.progress = Progress("lines", stream)
    generator._show("drawing", cached)
    if cached:
        flux.cache(computed_steps=4)
    flux()
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith(f"drawing: {STEPS} of {STEPS}")
    assert last.endswith("50% skipped") is cached
    generator._show("", cached)
    flux()
    assert len(stream.getvalue().splitlines()) == 2
    assert capsys.readouterr().err == ""

"""What becomes of a request whose picture fails, and which options no request may give.

One process: a rank is whatever answers on the line. tests/test_serve.py has real ranks.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest
from support.failing_methods import register_in

from xfuser_fastcache import plugins
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.config.checks import options_of
from xfuser_fastcache.serving.line import StopSign
from xfuser_fastcache.serving.requests import (
    OPERATORS,
    GenerateRequest,
    RequestRefused,
    _cache_of,
)
from xfuser_fastcache.serving.service import GenerationFailed, Service, failure_of

DRAWN = {
    **{"error": None, "place": "after", "seconds": 1.0, "memory_bytes": 1},
    **{"statistics": {}, "decisions": []},
}
TRIAL = {"trial": True}


class Ended(Exception):
    """Stands in for the end of the process."""


class Ranks:
    """Two ranks' reports, in place of painter and line; a rank that follows rank 0 sends its own.

    Attributes:
        wrong: what each rank reports of the next order that is no trial.
        trials: the picture, or the error, of each trial; the last one stays.
    """

    patience_s = 1.0

    def __init__(self) -> None:
        self.wrong: dict[int, dict[str, Any]] = {}
        self.trials: list[dict[str, Any]] = [{"picture": "same"}]
        self.order: dict[str, Any] = {}
        self.tried = 0

    def report(self, rank: int) -> dict[str, Any]:
        if self.order != TRIAL:
            return {**DRAWN, **({} if rank else self.encoded("a picture"))} | self.wrong.get(
                rank, {}
            )
        found = self.trials[min(self.tried, len(self.trials) - 1)]
        self.tried += rank
        return {**DRAWN, **found, **(self.encoded(found.get("picture", "")) if not rank else {})}

    @staticmethod
    def encoded(picture: str) -> dict[str, Any]:
        return {"picture": base64.b64encode(picture.encode()).decode()}

    def trial(self) -> dict[str, Any]:
        return TRIAL

    def attempt(self, order: dict[str, Any], tell: Any) -> dict[str, Any]:
        self.order = order
        return self.report(0)

    def receive(self) -> dict[int, dict[str, Any]]:
        report = self.report(1)
        report.pop("picture", None)
        return {1: report}

    def expect(self, limit_s: float, what: str) -> None: ...
    def hurry(self, why: str) -> None: ...
    def rest(self) -> None: ...
    def send(self, message: dict[str, Any]) -> None: ...


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def service(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service(
        ranks,  # type: ignore[arg-type]
        StopSign(),
        queue_size=2,
        generation_timeout_s=60,
        drain_timeout_s=1,
    )

    def ended(reason: str) -> None:
        raise Ended(reason)

    monkeypatch.setattr(made, "break_down", ended)
    made.try_out(ranks, "the first trial")  # type: ignore[arg-type]
    return made


def drawn(service: Service, ranks: Any) -> Any:
    """One request's answer, and its error otherwise."""
    (job,) = service.submit([{"seed": 1}])
    assert service._next() is job and job.answer.set_running_or_notify_cancel()
    service._draw(job, ranks)
    return job.answer.result(0)


def failing(place: str, *errors: str) -> dict[int, dict[str, Any]]:
    return {rank: {"place": place, "error": error} for rank, error in enumerate(errors) if error}


FAILURES = {
    "an error of all": failing("within", "ValueError: no", "ValueError: no"),
    "one rank's own work": failing("within", "", "OutOfMemoryError: decoding"),
    "one waited in vain": failing("within", "ValueError: no", "RuntimeError: Timed out"),
    "two places": failing("within", "ValueError: no", "") | failing("before", "", "ValueError: no"),
    "one did not begin": failing("before", "", "ValueError: no"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_the_requests_alone_where_a_trial_holds(
    service: Service, ranks: Ranks, kind: str
) -> None:
    ranks.wrong = FAILURES[kind]
    with pytest.raises(GenerationFailed, match="this picture failed: .*Error") as failed:
        drawn(service, ranks)
    told = {report["error"] for report in ranks.wrong.values()}
    assert ("rank 1: " in str(failed.value)) == (len(told) > 1 or len(ranks.wrong) == 1)
    assert ranks.tried == 2  # at the start, and now
    ranks.wrong = {}
    assert drawn(service, ranks).picture == b"a picture"
    requests = service.meters.statistics()["requests"]
    assert (requests["failed"], requests["done"]) == (1, 1)


def test_what_all_ranks_refuse_before_the_model_is_called_is_the_clients(
    service: Service, ranks: Ranks
) -> None:
    ranks.wrong = failing("before", "ValueError: no such size", "ValueError: no such size")
    with pytest.raises(RequestRefused, match="^no such size$"):
        drawn(service, ranks)
    assert ranks.tried == 1
    assert service.meters.statistics()["requests"]["refused"] == 1


def test_a_failure_after_drawing_needs_no_trial(service: Service, ranks: Ranks) -> None:
    ranks.wrong = failing("after", "ValueError: the picture holds NaN or infinity")
    with pytest.raises(GenerationFailed, match="NaN"):
        drawn(service, ranks)
    assert ranks.tried == 1


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        ({"picture": "another"}, "request 1 failed, and the trial after it drew another picture"),
        (
            {"error": "RuntimeError: Connection closed by peer", "place": "within"},
            "request 1 failed, and the trial after it failed on RuntimeError: Connection closed",
        ),
    ],
)
def test_ranks_between_which_something_is_left_end(
    service: Service, ranks: Ranks, trial: dict[str, Any], reason: str
) -> None:
    ranks.wrong = FAILURES["an error of all"]
    ranks.trials += [trial]
    with pytest.raises(Ended, match=reason):
        drawn(service, ranks)


def test_a_first_trial_that_fails_ends_the_start(service: Service, ranks: Ranks) -> None:
    ranks.trials = [{"error": "ValueError: no such kernel", "place": "within"}]
    with pytest.raises(Ended, match="the first trial failed on ValueError: no such kernel"):
        service.try_out(ranks, "the first trial")  # type: ignore[arg-type]


def test_no_failure_is_no_failure() -> None:
    assert failure_of({0: DRAWN, 1: DRAWN}) is None


# ---- files --------------------------------------------------------------------------------------


def test_every_option_that_could_hold_a_path_is_the_operators() -> None:
    """Found by giving a path to each, so that an option that is added later is not forgotten."""

    def takes_paths(name: str) -> bool:
        try:
            options_of(CacheConfig)[name].metadata["check"].read("/etc/passwd")
        except (TypeError, ValueError):
            return False
        return True

    methods = {"use_cache", "gate", "forecaster", "token_plan"}
    found = {name for name in options_of(CacheConfig) if takes_paths(name)} - methods
    assert found >= {"calibration", "linear_maps"}
    assert found | {"sync_backend", "sync_timeout_s"} == set(OPERATORS)


@pytest.mark.parametrize("option", ["calibration", "linear_maps"])
@pytest.mark.parametrize("path", ["there", "missing", "fifo", ".", "", 1, ["there"]])
def test_a_request_cannot_tell_a_file_from_none(tmp_path: Path, option: str, path: Any) -> None:
    """A FIFO would hold whoever opens it."""
    (tmp_path / "there").write_text("secret")
    os.mkfifo(tmp_path / "fifo")
    given = str(tmp_path / path) if isinstance(path, str) else path
    request = GenerateRequest(prompt="a", use_cache="Fast", cache_config={option: given})
    with pytest.raises(RequestRefused) as refused:
        _cache_of(request, None)
    assert str(refused.value) == (
        f"{option}={given!r:.80} is not allowed; it is set by whoever runs this service"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"gate": {"name": "Failing", "table": "/etc/passwd"}},
        {"gate": {"all_of": ["Fast", {"any_of": [{"name": "Failing", "table": "/etc/passwd"}]}]}},
    ],
)
def test_a_method_of_another_package_gets_no_file_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    register_in(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    plugins.look_again()
    try:
        request = GenerateRequest(prompt="a", use_cache="Fast", cache_config=config)
        with pytest.raises(RequestRefused, match="table of 'Failing' is not allowed; a request"):
            _cache_of(request, None)
        plain = GenerateRequest(prompt="a", use_cache="Failing", cache_config={})
        assert _cache_of(plain, None)
    finally:
        monkeypatch.undo()
        plugins.look_again()

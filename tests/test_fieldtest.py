"""`fastcache fieldtest`: toys on one and two ranks, its schema, faults, what it never tells.

Pure CPU, and gloo with two ranks; figures of time are not judged.
"""

from __future__ import annotations

import copy
import getpass
import json
import socket
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.worlds import ROOT, WorldFailed, launch

from xfuser_fastcache.benchmarks.field.scrubbing import LONGEST, Scrubber

PROMPT = "a large red ring, top left, on dark blue"
SMALL = ("--num_inference_steps", "6", "--height", "64", "--width", "64", "--dtype", "float32")


def fieldtest(output: Path, toy: str, ranks: int, *flags: str, fault: str = "") -> dict[str, Any]:
    """Run the command on a toy; return its report."""
    with mock.patch.dict("os.environ", {"FAULT": fault}):
        launch(
            "fieldtest_worker.py", ranks, "--model", str(ROOT / "toys" / toy), *SMALL,
            "--rounds", "1", "--prompt", PROMPT, "--output", str(output), *flags,
        )  # fmt: skip
    return json.loads(output.read_text())


def errors_of(report: dict[str, Any]) -> list[str]:
    from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform

    enable_cpu_platform()
    from xfuser_fastcache.benchmarks.field import schema

    return schema.errors_of(report)


def cells_of(report: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {cell["variant"]: cell for cell in report["cells"] if cell["cell"] == name}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of two ranks, their weights offloaded in groups."""
    output = tmp_path_factory.mktemp("field") / "two.json"
    return fieldtest(output, "flux", 2, "--ulysses_degree", "2", "--enable_group_cpu_offload")


@pytest.mark.gloo
def test_two_ranks_agree_and_threshold_0_is_the_uncached_picture(two: dict[str, Any]) -> None:
    assert errors_of(two) == [] and two["finished"]
    assert two["layout"]["ranks"] == two["layout"]["ulysses"] == 2
    assert two["flags"]["enable_group_cpu_offload"] is True
    load = cells_of(two, "load")["all"]["figures"]
    assert load["transformer"] == "FluxTransformer2DModel"
    assert load["backend_of_each_rank"] == ["gloo", "gloo"]
    speed = {name: cell["figures"] for name, cell in cells_of(two, "speed").items()}
    assert list(speed) == ["uncached", "threshold 0", "Fast", "mask, output", "mask, damped_taylor"]
    assert speed["threshold 0"]["identical"] and speed["threshold 0"]["share_skipped"] == 0
    for name in ("mask, output", "mask, damped_taylor"):
        assert speed[name]["share_skipped"] == pytest.approx(4 / 6)
        assert not speed[name]["identical"] and speed[name]["psnr_db"] > 20
        assert len(speed[name]["digest_of_each_rank"]) == 2 and speed[name]["digests_agree"]
        assert len(set(speed[name]["digest_of_each_rank"])) == 1
    assert all(len(figures["peak_bytes_of_each_rank"]) == 2 for figures in speed.values())


@pytest.mark.gloo
def test_the_report_tells_no_prompt_path_or_name(two: dict[str, Any]) -> None:
    text = json.dumps(two)
    assert two["prompts"] == 1 and two["model"] is None
    for secret in (PROMPT, str(ROOT), str(Path.home()), socket.gethostname()):
        assert secret not in text
    assert f"/{getpass.getuser()}/" not in text


@pytest.mark.gloo
def test_one_rank_with_a_cache_of_the_users(tmp_path: Path) -> None:
    report = fieldtest(
        tmp_path / "one.json", "sd3", 1, "--quantization", "layerwise_fp8", "--rounds", "2",
        "--use_cache", "Fast", "--cache_config", '{"cache_ratio_threshold": 1.0}',
    )  # fmt: skip
    assert errors_of(report) == [] and report["finished"]
    formats = cells_of(report, "load")["all"]["figures"]["formats_of_each_rank"][0]
    assert formats["float8_e4m3fn"] > formats["float32"] > 0
    speed = {name: cell["figures"] for name, cell in cells_of(report, "speed").items()}
    assert list(speed) == ["uncached", "threshold 0", "yours"]
    assert report["configs"]["yours"]["cache_ratio_threshold"] == 1.0
    assert speed["threshold 0"]["identical"]
    assert speed["yours"]["share_skipped"] > 0 and not speed["yours"]["identical"]
    for name in ("uncached", "yours"):
        assert len(speed[name]["seconds_of_each_run"]) == 2
        assert speed[name]["repeats_to_the_bit"] is True


@pytest.mark.slow
@pytest.mark.gloo
def test_data_parallel_replicas_may_decide_differently(tmp_path: Path) -> None:
    report = fieldtest(
        tmp_path / "data.json", "flux", 2, "--data_parallel_degree", "2", "--use_cache", "Fast"
    )
    load = cells_of(report, "load")["all"]["figures"]
    assert load["replica_of_each_rank"] == [0, 1]
    assert cells_of(report, "speed")["yours"]["figures"]["digests_agree"]


@pytest.mark.gloo
def test_what_cannot_be_loaded_is_refused_with_its_mend(tmp_path: Path) -> None:
    with pytest.raises(WorldFailed, match=r"exit codes of ranks: \{0: 1\}"):
        fieldtest(tmp_path / "refused.json", "flux", 1, "--use_fp8_t5_encoder")
    report = json.loads((tmp_path / "refused.json").read_text())
    assert errors_of(report) == []
    (refused,) = report["cells"]
    assert (refused["cell"], refused["status"]) == ("load", "refused")
    assert "leave it out" in refused["reason"]


@pytest.mark.gloo
@pytest.mark.slow
def test_a_refused_cache_does_not_end_the_rest(tmp_path: Path) -> None:
    report = fieldtest(
        tmp_path / "mask.json", "flux", 2, "--ulysses_degree", "2", "--rounds", "2",
        "--use_cache", "Fast", "--cache_config", '{"steps_mask": [1, 0, 1]}',
    )  # fmt: skip
    assert errors_of(report) == [] and report["finished"]
    speed = cells_of(report, "speed")
    assert len(speed["uncached"]["figures"]["seconds_of_each_run"]) == 2
    refused = speed["yours"]
    assert refused["status"] == "refused"
    assert "2 rank(s)" in refused["reason"] and "one entry a step" in refused["reason"]


@pytest.mark.gloo
@pytest.mark.chaos
def test_a_stage_that_refuses_alone_is_heard(tmp_path: Path) -> None:
    """The first stage refuses the mask; the second one waits for what it would have sent."""
    with pytest.raises(WorldFailed):
        fieldtest(
            tmp_path / "stage.json", "flux", 2, "--pipefusion_parallel_degree", "2",
            "--use_cache", "Fast", "--cache_config", '{"steps_mask": [1, 0, 1]}', fault="none",
        )  # fmt: skip
    report = json.loads((tmp_path / "stage.json").read_text())
    assert errors_of(report) == [] and not report["finished"]
    speed = cells_of(report, "speed")
    assert speed["threshold 0"]["figures"]["identical"]
    assert speed["yours"]["status"] == "refused"
    assert "rank 0" in speed["yours"]["reason"] and "one entry a step" in speed["yours"]["reason"]


@pytest.mark.gloo
@pytest.mark.chaos
def test_a_rank_that_fails_alone_is_named_in_the_report(tmp_path: Path) -> None:
    with pytest.raises(WorldFailed):
        fieldtest(tmp_path / "alone.json", "flux", 2, "--ulysses_degree", "2", fault="alone")
    report = json.loads((tmp_path / "alone.json").read_text())
    assert errors_of(report) == [] and not report["finished"]
    speed = cells_of(report, "speed")
    assert speed["threshold 0"]["status"] == "ok"
    assert speed["Fast"]["status"] == "error"
    assert "rank 1" in speed["Fast"]["reason"] and "out of memory" in speed["Fast"]["reason"]


def test_the_budget_ends_what_hangs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfuser_fastcache.benchmarks.field import together

    ended = threading.Event()
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(together.os, "_exit", lambda status: ended.set())
    meeting = together.Together(0.2, lambda *reason: said.append(reason))
    (outcome,) = meeting.run("cell", lambda: ended.wait(30.0))
    meeting.close()
    assert outcome.value is True and said == [("left out", "the budget was spent")]


def test_an_error_of_others_is_an_error_and_one_of_ours_a_refusal() -> None:
    from xfuser_fastcache.apply import apply_cache_on_transformer
    from xfuser_fastcache.benchmarks.field.together import Together

    def ours() -> None:
        apply_cache_on_transformer(torch.nn.Linear(2, 2), use_cache="Fast")

    meeting = Together(100.0, lambda *reason: None)
    (refused,), (error,) = meeting.run("a", ours), meeting.run("b", lambda: int("x"))
    meeting.close()
    assert refused.status == "refused" and "Traceback" not in refused.reason
    assert error.status == "error" and "invalid literal" in error.reason


@pytest.mark.gloo
def test_the_schema_finds_what_is_wrong(two: dict[str, Any]) -> None:
    for change, words in (
        (lambda r: r.pop("layout"), "has no layout"),
        (lambda r: r.update(schema=7), "schema is 7"),
        (lambda r: cells_of(r, "speed")["Fast"].update(status="fine"), "unknown status"),
        (lambda r: cells_of(r, "speed")["Fast"]["figures"].pop("digests_agree"), "Fast has no"),
        (lambda r: cells_of(r, "speed")["uncached"]["figures"].clear(), "has no ms_a_step"),
        (lambda r: r["flags"].update(config="/home/me/my.yaml"), "tells a path"),
        (lambda r: r["machine"].update(driver="at 10.0.0.7"), "tells a path or an address"),
    ):
        wrong = copy.deepcopy(two)
        change(wrong)
        assert any(words in error for error in errors_of(wrong)), words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no file /home/me/a b.png", "no file PATH b.png"),
        (r"C:\Users\me\x.bin is missing", "PATH is missing"),
        ("see https://example.org/docs/x.html", "see https://example.org/docs/x.html"),
        ("and/or 1/2, ms/step", "and/or 1/2, ms/step"),
        ("rank at 192.168.0.7:29500", "rank at ADDRESS:29500"),
        ("drew 'a red ring' for ringleader", "drew 'PROMPT' for ringleader"),
        ("toys/mine/maps.safetensors", "PATH"),
        ("device of dev", "device of dev"),
    ],
)
def test_a_scrubbed_text_tells_nothing(text: str, wanted: str) -> None:
    scrub = Scrubber(
        {"a red ring": "PROMPT", "ring": "PROMPT", "toys/mine/maps.safetensors": "PATH"}
    )
    assert scrub({"reason": [text]}) == {"reason": [wanted]}


def test_a_long_text_keeps_its_end() -> None:
    assert (
        Scrubber({})("x" * 9000 + "the error") == "..." + ("x" * 9000 + "the error")[3 - LONGEST :]
    )

"""`fastcache bench-gpu`: its rehearsal on a CPU measures what it says, and keeps what it has.

Pure CPU: the command runs with tiny shapes; figures of time are not judged. What needs a GPU says
so as the reason of its cell.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.worlds import python

from xfuser_fastcache import cli
from xfuser_fastcache.apply import get_cache_statistics
from xfuser_fastcache.benchmarks.gpu import costs, peers, run
from xfuser_fastcache.benchmarks.gpu.families import FAMILIES
from xfuser_fastcache.benchmarks.gpu.page import page_of
from xfuser_fastcache.benchmarks.gpu.record import ERROR, LEFT_OUT, OK, LeftOut, Record
from xfuser_fastcache.benchmarks.gpu.schema import errors_of, joined
from xfuser_fastcache.benchmarks.gpu.speed import FORECASTERS, MEASURES, SKIPPED, Rounds, variants
from xfuser_fastcache.benchmarks.gpu.subject import Subject, computed_mask, same_bits

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12


def cells_of(report: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {c["variant"]: c for c in report["cells"] if c["cell"] == name}


def rehearse(folder: Path, *flags: str, code: int = 0) -> dict[str, Any]:
    output = folder / "gpu.json"
    command = ("-m", "xfuser_fastcache.cli", "bench-gpu", "--small", "--output", output)
    done = python(*command, *flags)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return rehearse(folder, "--families", "flux", "--page", str(folder / "gpu.md"))


def small(name: str = "flux", steps: int = STEPS) -> Subject:
    return Subject(name, FAMILIES[name], torch.device("cpu"), True, steps)


def test_the_rehearsal_measures_every_cell_that_needs_no_gpu(report: dict[str, Any]) -> None:
    assert errors_of(report) == []
    assert report["finished"] and report["small"] and report["steps"] == STEPS
    statuses = {(c["cell"], c["variant"]): c["status"] for c in report["cells"]}
    without_gpu = {key for key, status in statuses.items() if status == LEFT_OUT}
    wanted = {"memory", "synchronisations", "kernels", "consensus", "peers"}
    assert {cell for cell, _ in without_gpu} <= wanted
    assert ("consensus", "nccl") in without_gpu and ("consensus", "gloo") not in without_gpu
    assert [key for key, status in statuses.items() if status == ERROR] == []


def test_the_skipped_share_is_the_masks(report: dict[str, Any]) -> None:
    speed = cells_of(report, "speed")
    for share in SKIPPED:
        mask = computed_mask(STEPS, share)
        for forecaster in FORECASTERS:
            figures = speed[f"{forecaster}, {share:.0%} skipped"]["figures"]
            assert figures["share_skipped"] == pytest.approx(1 - sum(mask) / len(mask))
            assert figures["differs_from_uncached"] and figures["finite"]
            assert figures["share_of_ideal"] == pytest.approx(
                figures["speedup"] * sum(mask) / len(mask)
            )
    assert speed[MEASURES]["figures"]["share_skipped"] == 0
    assert speed[MEASURES]["figures"]["identical_to_uncached"]


def test_what_holds_everywhere_holds_here(report: dict[str, Any]) -> None:
    assert cells_of(report, "identity")["threshold 0"]["figures"]["identical_to_uncached"]
    digest = cells_of(report, "digest")["two generations"]["figures"]
    assert digest["digest_repeats"] and digest["repeats_to_the_bit"]
    assert 0 < digest["share_skipped"] < 1
    toy = cells_of(report, "toy")["float32"]["figures"]
    assert toy["threshold_0_identical"] and toy["psnr_db"] > 40


def test_the_page_has_every_table_and_says_what_is_missing(
    report: dict[str, Any], folder: Path
) -> None:
    page = (folder / "gpu.md").read_text()
    assert page == page_of(report)
    for words in (FAMILIES["flux"].title, "share of ideal", "Toys", "What one card cannot tell"):
        assert words in page
    assert "needs a GPU" in page


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_cached_and_restored(name: str) -> None:
    subject = small(name, steps=8)
    plain = subject.denoise()
    with subject.cached(cache_ratio_threshold=0):
        assert same_bits(subject.denoise(), plain)
    with subject.cached(forecaster="output", steps_mask=computed_mask(8, 0.5)):
        assert not same_bits(subject.denoise(), plain)
    assert same_bits(subject.denoise(), plain)


def test_a_cell_that_raises_is_noted_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(costs, "moments", broken)
    monkeypatch.setattr(run, "_wire_and_toys", lambda record, plan: None)
    plan = run.Plan(["flux"], 8, 1, True, ROOT / "toys", torch.device("cpu"))
    report = run.run(plan, tmp_path / "gpu.json", 100.0, "test")
    assert errors_of(report) == []
    (cell,) = cells_of(report, "moments").values()
    assert cell["status"] == ERROR and "out of order" in cell["reason"]
    assert report["cells"].index(cell) < len(report["cells"]) - 1
    assert all(c["status"] == OK for c in cells_of(report, "compiled speed").values())
    assert "out of order" in page_of(report)


def test_the_budget_ends_it_with_what_it_has(tmp_path: Path) -> None:
    report = rehearse(tmp_path, "--budget_s", "6", "--steps", "800", "--rounds", "9")
    assert errors_of(report) == []
    assert not report["finished"] and report["spent_s"] < 60
    assert report["cells"][0]["cell"] == "build"


@pytest.mark.timeout(60, method="thread")  # The other method takes the alarm for itself.
def test_an_alarm_that_nobody_hears_rings_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf:
        """Takes the first alarm with it: Python prints what a finalizer raises, and goes on."""

        def __del__(self) -> None:
            time.sleep(0.5)

    def measured(*arguments: Any) -> None:
        Deaf()
        time.sleep(30)

    monkeypatch.setattr(run, "_with_subject", measured)
    monkeypatch.setattr(run, "RING_AGAIN_S", 0.5)
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    plan = run.Plan(["flux"], 8, 1, True, ROOT / "toys", torch.device("cpu"))
    report = run.run(plan, tmp_path / "gpu.json", 0.2, "test")
    assert not report["finished"] and report["spent_s"] < 10


def test_an_error_in_a_later_round_keeps_the_earlier_figures(tmp_path: Path) -> None:
    record = Record(tmp_path / "gpu.json", {}, 100.0)
    assert record.measure("any", "cell", "variant", lambda: {"ms": 1.0})

    def fails() -> dict[str, Any]:
        raise ValueError("later")

    assert not record.measure("any", "cell", "variant", fails)
    (cell,) = record.as_dict(False)["cells"]
    assert cell["status"] == ERROR and cell["figures"] == {"ms": 1.0}


def test_no_cell_begins_that_the_budget_cannot_hold(tmp_path: Path) -> None:
    record = Record(tmp_path / "gpu.json", {}, 1.0)
    assert not record.measure("any", "cell", "variant", lambda: {}, needs_s=5.0)
    (cell,) = json.loads((tmp_path / "gpu.json").read_text())["cells"]
    assert cell["status"] == LEFT_OUT and "needs 5 s" in cell["reason"]


def test_rounds_compare_within_a_round(tmp_path: Path) -> None:
    subject = small(steps=8)
    record = Record(tmp_path / "gpu.json", {}, 100.0)
    rounds = Rounds(record, "speed", subject, variants(8, (0.5,)))
    rounds.run(2)
    assert {len(times) for times in rounds.times.values()} == {2}
    for variant, ratios in rounds.ratios.items():
        pairs = zip(rounds.times["uncached"], rounds.times[variant], strict=True)
        assert ratios == pytest.approx([uncached / own for uncached, own in pairs])


def test_synchronisations_are_named_by_file_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's warnings stand in for the device: each `tolist` and `item` of ours gives one."""
    monkeypatch.setattr(costs, "_needs_gpu", lambda subject: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    original = torch.Tensor.tolist

    def waiting(self: torch.Tensor) -> Any:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return original(self)

    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    figures = costs.synchronisations(small(), {"cache_ratio_threshold": 1e-9})
    assert figures["steps"] == 3 and len(figures["of_each_step"]) == 3
    # This file's stand-in is the innermost line outside of torch.
    assert all("test_bench_gpu.py:" in place for place in figures["places"])
    assert sum(figures["places"].values()) == sum(figures["of_each_step"]) > 0


def test_peers_leave_the_model_as_it_was() -> None:
    subject = small(steps=8)
    plain = subject.denoise()
    changes = peers.residual_changes(subject)
    figures = peers.peer(subject, "diffusers FirstBlockCache", changes, 1)
    assert 0 < figures["share_skipped"] < 1
    assert same_bits(subject.denoise(), plain)


def test_a_peer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(LeftOut, match="not installed"):
        peers.peer(small(steps=8), "cache-dit DBCache, mask", torch.zeros(8, 8), 1)


def test_the_schema_finds_what_is_wrong(report: dict[str, Any]) -> None:
    for change, words in (
        (lambda r: r.pop("device"), "has no device"),
        (lambda r: r["cells"].append(r["cells"][0]), "twice"),
        (lambda r: r["cells"][0].update(status="fine"), "unknown status"),
        (lambda r: r["cells"][0].update(reason="?"), "with the reason"),
        (lambda r: cells_of(r, "identity")["threshold 0"]["figures"].clear(), "has no identical"),
    ):
        wrong = copy.deepcopy(report)
        change(wrong)
        assert any(words in error for error in errors_of(wrong)), words


def test_a_long_family_gets_half_the_steps_and_the_middle_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU its sizes are small, and its steps all; what is measured is what a card would."""
    monkeypatch.setattr(run.wire, "consensus_cost", lambda backend, repeat: {"ranks": 1})
    plan = run.Plan(["wan-1.3b"], STEPS, 2, True, ROOT / "toys", torch.device("cpu"))
    report = run.run(plan, tmp_path / "gpu.json", 100.0, "test")
    assert errors_of(report) == []
    assert [c for c in report["cells"] if c["status"] == ERROR] == []
    speed = cells_of(report, "speed")
    assert set(speed) == {"uncached", MEASURES, *(f"{name}, 64% skipped" for name in FORECASTERS)}
    assert {len(c["figures"]["ms_of_each_run"]) for c in speed.values()} == {1}
    assert not cells_of(report, "compile") and not cells_of(report, "toy")

    full = FAMILIES["wan-1.3b"]
    cut = dataclasses.replace(full, full=full.small)
    assert Subject("wan-1.3b", cut, torch.device("cpu"), False, 28).steps == 14


def test_guidance_by_two_calls_names_its_branches() -> None:
    """Without the names, the second call of a step would be taken for the next step."""
    subject = small("qwen-image", steps=8)
    with subject.cached(steps_mask=computed_mask(8, 0.5), forecaster="output"):
        subject.denoise()
        statistics = get_cache_statistics(subject.model)
    assert statistics["steps"] == 8 and statistics["collectives"] == 16
    assert statistics["block_approx_ratio"] == pytest.approx(0.5)


def test_reports_of_one_device_are_joined(report: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(report)
    other.update(command="another", families={"sd3": "SD3"}, finished=False, spent_s=1.0)
    for cell in other["cells"]:
        cell["family"] = "sd3" if cell["family"] == "flux" else cell["family"]
    paths = [tmp_path / name for name in ("one.json", "two.json")]
    for path, made in zip(paths, (report, other), strict=True):
        path.write_text(json.dumps(made))
    output, page = tmp_path / "both.json", tmp_path / "page.md"
    arguments = ["bench-gpu", "--read", *paths, "--output", output, "--page", page]
    assert cli.main([str(argument) for argument in arguments]) == 0
    both = json.loads(output.read_text())
    assert errors_of(both) == [] and not both["finished"]
    assert {cell["family"] for cell in both["cells"]} == {"flux", "sd3", "any"}
    assert "## SD3" in page.read_text() and "another" in page.read_text()
    with pytest.raises(ValueError, match="differ in device"):
        joined([report, {**other, "device": "another card"}])


def test_the_command_lists_commands_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "bench-gpu" in capsys.readouterr().out
    assert cli.main([]) == 2 and cli.main(["bench-cpu"]) == 2
    assert "no command 'bench-cpu'" in capsys.readouterr().err


def test_a_page_needs_a_report_of_this_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text("{}")
    arguments = ["--read", str(tmp_path / "other.json"), "--page", str(tmp_path / "page.md")]
    with pytest.raises(SystemExit):
        cli.main(["bench-gpu", *arguments])
    assert "no report of this command" in capsys.readouterr().err

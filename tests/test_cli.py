"""The command `fastcache`: what it lists, how it refuses, what the doctor finds. Pure CPU."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from support.worlds import ROOT, python

from xfuser_fastcache.cli import COMMANDS, doctor, main

LAUNCHERS = {
    "generate", "calibrate", "benchmark", "serve", "layouts", "fit_maps", "fit_polynomial",
    "fastcache_benchmark", "overhead", "token_gain", "simulate_tests", "compatibility", "train_toy",
}  # fmt: skip


def test_it_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert main(["brew"]) == 2
    assert "there is no command 'brew'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_what_cannot_be_done_is_said_in_a_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(arguments: list[str]) -> int:
        raise error(f"not\n   {arguments[0]}")

    monkeypatch.setattr(doctor, "main", refuse)
    assert main(["doctor", "this"]) == 2
    assert capsys.readouterr().err == "fastcache doctor: not this\n"


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "xfuser_fastcache.cli.serve", raising=False)
    monkeypatch.delitem(sys.modules, "xfuser_fastcache.serving.web", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert 'pip install "xfuser-fastcache[serve]"' in capsys.readouterr().err


def test_every_script_is_a_launcher() -> None:
    scripts = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
    assert set(scripts) == LAUNCHERS | {"__init__"}
    assert all(len(path.read_text().splitlines()) <= 26 for path in scripts.values())


@pytest.mark.parametrize("flags", [["--audit", "f"], ["--audit=f"]])
def test_the_script_audits_by_its_flag(flags: list[str]) -> None:
    from scripts.calibrate import command_of

    found = command_of(["--model", "m", *flags, "--seed", "2"])
    assert found[0] == "audit" and sorted(found[1:]) == ["--model", "--seed", "2", "f", "m"]
    assert command_of(["--model", "m"]) == ["calibrate", "--model", "m"]


def test_python_m_is_the_same_program() -> None:
    done = python("-m", "xfuser_fastcache.cli", "doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert report["versions"]["torch"] and report["devices"][-1].startswith("CPU")
    names = {(row["group"], row["name"]) for row in report["registered"]}
    assert {("adapters", "flux"), ("layouts", "xdit"), ("backends", "Fast")} <= names


def test_a_stale_plug_in_is_listed_and_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Found(list[EntryPoint]):
        groups = ("console_scripts", "xfuser_fastcache.brews")

    stale = EntryPoint("tea", "no_such_package:Tea", "xfuser_fastcache.brews")
    taken = EntryPoint("tea", "json:loads", "xfuser_fastcache.brews")

    def entries(**chosen: Any) -> Any:
        return [stale, taken] if chosen else Found()

    monkeypatch.setattr(doctor, "entry_points", entries)
    assert doctor.main(["--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["registered"]
    first, second = (row for row in rows if row["group"] == "brews")
    assert first["error"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert second["error"] == "the name is taken by no_such_package:Tea"
    assert ("adapters", "flux", "") in {(r["group"], r["name"], r["error"]) for r in rows}
    assert doctor.main([]) == 1
    assert "does not load: brews tea of " in capsys.readouterr().out


def test_what_is_refused_here_says_why_and_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_accelerator", lambda: False)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "toys_of_checkout", lambda: None)
    found = {row["what"]: row for row in doctor.refusals()}
    assert "enable_cpu_platform()" in found["import xfuser"]["mend"]
    assert found['sync_backend="nccl"']["mend"] == 'use sync_backend="gloo"'
    assert "checkout" in found["fastcache layouts"]["mend"]
    assert all(row["why"] and row["mend"] for row in found.values())


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart"])
def test_a_toys_arguments_lie_beside_its_weights(name: str) -> None:
    from toys.training.families import FAMILIES
    from xfuser_fastcache.xdit.loaded import call_arguments

    assert call_arguments(str(ROOT / "toys" / name)) == FAMILIES[name]().call_kwargs


def test_arguments_that_are_no_object_are_refused(tmp_path: Path) -> None:
    from xfuser_fastcache.xdit.loaded import call_arguments

    assert call_arguments(str(tmp_path)) == {}
    (tmp_path / "call.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"call.json holds \[1\]; give an object"):
        call_arguments(str(tmp_path))


def test_a_model_outside_of_the_toys_gets_shipped_prompts(tmp_path: Path) -> None:
    from toys.captions import sample_captions
    from xfuser_fastcache.calibration.prompts import AUDIT, CALIBRATE, prompts_for, shipped

    toy = str(ROOT / "toys" / "flux")
    assert prompts_for(toy, CALIBRATE, 5, seed=1) == sample_captions(5, seed=1, split="train")
    assert prompts_for(toy, AUDIT, 5, seed=1) == sample_captions(5, seed=1, split="unseen")
    for use in (CALIBRATE, AUDIT):
        found = prompts_for(str(tmp_path), use, 7, seed=1)
        assert found == prompts_for("a/name", use, 7, seed=1) != prompts_for("a", use, 7, seed=2)
        assert len(set(found)) == 7 and set(found) <= set(shipped(use))
    with pytest.raises(ValueError, match="101 prompts are needed, and the package ships 100"):
        prompts_for(str(tmp_path), AUDIT, 101, seed=0)

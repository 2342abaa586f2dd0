"""docs/extending.md, executed: a gate of another package, by entry point, on two ranks."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from xfuser_fastcache import CacheConfig
from xfuser_fastcache.backends import BACKENDS, gate_of
from xfuser_fastcache.plugins import GATES, registered

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def block(mark: str) -> str:
    """Return the code under a mark of the page."""
    (found,) = re.findall(rf"<!-- {re.escape(mark)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package as pip would lay it out: the module, and metadata beside it."""
    site = tmp_path_factory.mktemp("site")
    (site / "budget_gate.py").write_text(block("file: budget_gate.py"))
    project = block("file: pyproject.toml")
    name, version = (re.search(rf'{key} = "(.+)"', project)[1] for key in ("name", "version"))
    group, entry = re.search(r'entry-points\."(.+)"\]\n(.+)', project).groups()
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + entry.replace('"', "") + "\n")
    return site


@pytest.fixture
def on_path(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(installed)
    registered.cache_clear()
    yield
    registered.cache_clear()


@pytest.mark.gloo
def test_the_pages_gate_runs_under_ulysses(installed: Path, tmp_path: Path) -> None:
    words = shlex.split(block("run").replace("\\\n", " "))
    assert words[0] == "torchrun" and "--ulysses_degree" in words
    words[words.index("runs/budget")] = str(tmp_path)
    path = os.pathsep.join(filter(None, (str(installed), str(ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        timeout=280,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(set(report["decisions_digest"].values())) == 1 < len(report["decisions_digest"])
    assert report["collectives_per_step"] == 1
    assert 0.1 < report["statistics"]["block_approx_ratio"] < 0.75
    assert 20 < report["psnr_db"] < 90
    trace = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    weighed = [step for step in trace if step["statistic"] is not None]
    assert {step["threshold"] for step in weighed} == {1.2}
    # What was skipped over is never forgotten.
    skipped = [step["statistic"] for step in weighed if step["decision"] == "skipped"]
    assert skipped == sorted(skipped)


def test_the_pages_combination_is_a_config(on_path: Any, tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = CacheConfig.from_dict(yaml.safe_load(text))
    gate = gate_of(config)
    names = [type(rule).__name__ for rule in (*gate.rules, *gate.rules[-1].rules)]
    assert names == ["ChiSquareGate", "AccumulatedGate", "AnyOf", "FirstBlockGate", "BudgetGate"]
    assert gate.rules[-1].rules[1].budget == 1.2


def test_options_that_a_registered_gate_does_not_take_are_named(on_path: Any) -> None:
    for options, words in (({"budget": 1, "bugdet": 1}, "unexpected"), ({}, "missing")):
        with pytest.raises(ValueError, match=rf"gate 'budget' .*{words}.* it takes \(budget"):
            gate_of(CacheConfig(gate={"name": "budget", **options}))


def test_a_name_that_a_backend_has_is_refused(on_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(BACKENDS, "budget", BACKENDS["Fb"])
    with pytest.raises(ValueError, match="'budget' is a backend's, and budget_gate:BudgetGate is"):
        gate_of(CacheConfig(gate="budget"))


def test_an_unknown_gate_lists_the_known_ones_and_the_entry_point(on_path: Any) -> None:
    with pytest.raises(ValueError, match=f"unknown gate 'Slow'; known: Fast, .*budget.*{GATES}"):
        gate_of(CacheConfig(gate="Slow"))

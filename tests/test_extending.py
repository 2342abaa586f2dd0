"""docs/extending.md, executed: methods of another package, by entry point; a gate on two ranks."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.stack import Stack, ones
from support.worlds import launch, python, run_world
from test_backends import Pipeline
from test_engine import without_gradients  # noqa: F401

from xfuser_fastcache import CacheConfig, get_cache_statistics
from xfuser_fastcache.backends import FORECASTERS, gate_of
from xfuser_fastcache.benchmarks.layouts import LAYOUTS
from xfuser_fastcache.gates.base import Evidence, Gate, Verdict
from xfuser_fastcache.plugins import (
    BUILT_IN,
    GATES,
    TOKEN_PLANS,
    everything_registered,
    look_again,
)

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


MODULES = ("budget_gate", "blend", "every_other")


def block(mark: str) -> str:
    """Return the code under a mark of the page."""
    (found,) = re.findall(rf"<!-- {re.escape(mark)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package as pip would lay it out: the module, and metadata beside it."""
    site = tmp_path_factory.mktemp("site")
    for name in MODULES:
        (site / f"{name}.py").write_text(block(f"file: {name}.py"))
    project = block("file: pyproject.toml")
    name, version = (re.search(rf'{key} = "(.+)"', project)[1] for key in ("name", "version"))
    groups = re.findall(r'entry-points\."(.+)"\]\n(.+)', project)
    assert len(groups) == len(MODULES)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n" + entry.replace('"', "") + "\n" for group, entry in groups)
    )
    return site


@pytest.fixture
def on_path(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(installed)
    look_again()
    yield
    look_again()


@pytest.mark.gloo
def test_the_pages_gate_runs_under_ulysses(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(block("run").replace("\\\n", " "))
    assert words[0] == "torchrun" and "--ulysses_degree" in words
    words[words.index("runs/budget")] = str(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(installed))
    assert words[1:5] == ["--nproc_per_node", "2", "-m", "xfuser_fastcache.cli"]
    launch(ROOT / "xfuser_fastcache" / "cli" / "__main__.py", 2, *words[5:])
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


@pytest.mark.gloo
def test_what_the_page_registers_enters_the_matrix_the_benchmark_and_the_doctor(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own, since who was imported before does not look again."""
    path = os.pathsep.join((str(installed), str(ROOT), str(ROOT / "tests")))
    monkeypatch.setenv("PYTHONPATH", path)

    def printed(*command: str) -> Any:
        done = python(*command)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    shown = printed("-m", "xfuser_fastcache.cli", "doctor", "--json")
    ours = {row["name"] for row in shown["registered"] if row["package"] == "budget-gate"}
    assert ours == {"budget", "blend", "every_other"}
    found = printed(
        "-c",
        "import json, test_matrix as m\n"
        "from xfuser_fastcache.benchmarks.methods import all_methods\n"
        "cells = sorted({layout for _, layout, backend in m.CASES if backend == 'budget'})\n"
        "ways = list(m.variants('flux', 'Fast', True, 0))\n"
        "print(json.dumps([cells, ways, list(all_methods())]))",
    )
    cells, ways, methods = found
    assert cells == sorted(LAYOUTS)
    assert {"blend", "every_other"} < set(ways)
    assert {"budget", "fast-blend", "fast-every_other"} < set(methods)
    # A cell of it, as the matrix runs it.
    case = ("--case", "flux:Fast,budget", "--slow", "--ulysses_degree", "2")
    world = run_world("matrix_worker.py", 2, *case)
    assert all(world[rank]["models"]["flux"]["restored_exact"] for rank in (0, 1))
    for backend, variants in (("budget", ["stack"]), ("Fast", ["blend", "every_other"])):
        ranks = [world[rank]["models"]["flux"]["backends"][backend] for rank in (0, 1)]
        assert all(rank["threshold_0_exact"] for rank in ranks)
        for variant in variants:
            assert all(rank[variant]["repeats"] and rank[variant]["changed"] for rank in ranks)
            assert ranks[0][variant]["digest"] == ranks[1][variant]["digest"]
            assert all(rank[variant]["collectives_per_step"] == 1 for rank in ranks)


def test_the_pages_combination_is_a_config(on_path: Any, tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = CacheConfig.from_dict(yaml.safe_load(text))
    gate = gate_of(config)
    names = [type(rule).__name__ for rule in (*gate.rules, *gate.rules[-1].rules)]
    assert names == ["ChiSquareGate", "AccumulatedGate", "AnyOf", "FirstBlockGate", "BudgetGate"]
    assert gate.rules[-1].rules[1].budget == 1.2


def test_what_the_page_registers_is_found_and_not_loaded(on_path: Any) -> None:
    found = everything_registered()
    assert found[GATES.group]["budget"].value == "budget_gate:BudgetGate"
    assert found[FORECASTERS.group]["blend"].value == "blend:BlendForecaster"
    assert found[TOKEN_PLANS.group]["every_other"].value == "every_other:EveryOther"
    assert {"flux", "xdit"} <= found["xfuser_fastcache.adapters"].keys() | found[
        "xfuser_fastcache.layouts"
    ].keys()


def test_the_pages_gate_is_a_backend(on_path: Any) -> None:
    config = CacheConfig(use_cache="budget").resolved()
    assert gate_of(config).budget == 1.0
    assert (config.forecaster, config.num_warmup_steps) == ("reuse", 1)


@pytest.mark.parametrize(("share", "wanted"), [(1.0, 3.0), (0.5, 2.0)])
def test_the_pages_forecaster_stands_in(on_path: Any, share: float, wanted: float) -> None:
    stack = Stack(
        blocks=2, forecaster={"name": "blend", "share": share}, steps_mask=[1, 1, 0], num_steps=3
    )
    for level, adds in ((1.0, [1.0, 0.0]), (0.9, [1.0, 2.0]), (0.8, [9.0, 9.0])):
        stack.added = adds
        found = stack(ones(), level)
    assert stack.flags == [0, 0, 1]
    assert torch.equal(found, ones(1.0 + wanted))
    with pytest.raises(ValueError, match="share=2 is not allowed; give 0 <= number <= 1"):
        CacheConfig(forecaster={"name": "blend", "share": 2})
    corrected = CacheConfig(forecaster={"name": "adacorrection", "of": "blend"})
    assert corrected.methods.forecaster.depth == 2


def test_the_pages_token_plan_runs_half_the_tokens(on_path: Any) -> None:
    pipeline = Pipeline("flux")
    uncached = pipeline()
    pipeline.cache("Fast", token_plan="every_other", cache_ratio_threshold=0)
    found, statistics = pipeline(), get_cache_statistics(pipeline.transformer)
    assert found.isfinite().all() and not torch.equal(found, uncached)
    assert 0.1 < statistics["spatial_approx_ratio"] < 0.5
    assert statistics["block_approx_ratio"] == 0
    with pytest.raises(ValueError, match="'every_other' does not go with forecaster='output'"):
        CacheConfig(token_plan="every_other", forecaster="output")


def test_options_that_a_registered_gate_does_not_take_are_named(on_path: Any) -> None:
    with pytest.raises(ValueError, match="^bugdet in gate=.* no option of .*, which takes budget"):
        CacheConfig(gate={"name": "budget", "budget": 1, "bugdet": 1})
    with pytest.raises(
        ValueError, match="^budget=-1 is not allowed; give 0 <= number <= 1e.09; 0 never skips"
    ):
        CacheConfig(gate={"name": "budget", "budget": -1})


class Plain(Gate):
    """A gate that is no dataclass."""

    def __init__(self, limit: float):
        self.limit = limit

    def judge(self, evidence: Evidence, state: Any = None) -> Verdict:
        return Verdict(0.0, self.limit)


def registers(monkeypatch: Any, name: str, value: str) -> None:
    monkeypatch.setitem(BUILT_IN[GATES.group], name, value)
    look_again()


def test_a_gate_that_is_no_dataclass_is_checked_by_its_signature(
    on_path: Any, monkeypatch: Any
) -> None:
    registers(monkeypatch, "plain", "test_extending:Plain")
    config = CacheConfig(gate={"name": "plain", "limit": 2})
    assert gate_of(config).limit == 2
    assert CacheConfig.from_dict(config.resolved().to_dict()).digest() == config.digest()
    for options, words in (({"limit": 1, "x": 1}, "unexpected"), ({}, "missing")):
        with pytest.raises(ValueError, match=rf"gate 'plain' .*{words}.* it takes \(limit"):
            CacheConfig(gate={"name": "plain", **options})


def test_one_name_for_two_gates_is_refused(on_path: Any, monkeypatch: Any) -> None:
    registers(monkeypatch, "budget", "other:Gate")
    with pytest.raises(ValueError, match="named 'budget': other:Gate and budget_gate:BudgetGate"):
        CacheConfig()


def test_an_unknown_gate_lists_the_known_ones_and_the_entry_point(on_path: Any) -> None:
    with pytest.raises(ValueError, match=f"unknown gate 'Slow'; known: Fast, .*budget.*{GATES}"):
        CacheConfig(gate="Slow")

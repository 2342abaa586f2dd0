"""`fastcache layouts`: the cells are those of the registry, and what falls short is said."""

from __future__ import annotations

import copy
import itertools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.worlds import ROOT

from diffusers_adapters.registry import adapters
from xfuser_fastcache.benchmarks import layouts
from xfuser_fastcache.benchmarks.pipelining import pipeline_slots

TOYS = sorted(model for model in adapters() if (ROOT / "toys" / model).exists())
GOOD: dict[str, Any] = {
    "world_size": 2,
    "identical": False,
    "psnr_db": 45.0,
    "statistics": {"block_approx_ratio": 0.5},
    "collectives_per_step": 1.0,
    "decisions_digest": {"0": "a", "1": "a"},
    "parallel": {"data": 1},
    "pipeline_allows": None,
}


def test_every_model_in_every_layout_is_a_cell_or_excluded_with_a_reason() -> None:
    missing = {(m, at) for m in TOYS for at in layouts.LAYOUTS} - set(layouts.cells())
    degree = "--pipefusion_parallel_degree"
    assert missing == {
        (e.model, at)
        for e in layouts.EXCLUDED
        for at, (_, flags) in layouts.LAYOUTS.items()
        if e.flag in flags or (e.flag.startswith(degree) and any(degree in f for f in flags))
        if e.model in TOYS
    }
    assert all(e.reason for e in layouts.EXCLUDED)


@pytest.mark.parametrize("model", TOYS)
def test_a_cell_is_a_command_that_the_user_may_give(model: str) -> None:
    arguments = layouts.command(model, "pipefusion 2 x ulysses 2")
    assert arguments[:2] == ["--nproc_per_node=4", "scripts/generate.py"]
    assert {"--pipefusion_parallel_degree=2", "--ulysses_degree=2"} < set(arguments)


def test_guidance_counts_a_picture_twice() -> None:
    assert {model: layouts.pictures_of(model, 8) for model in TOYS} == {
        model: 8 if (model, "cfg 2") not in layouts.cells() else 4 for model in TOYS
    }


def test_a_model_without_a_toy_is_an_error_that_says_what_to_add() -> None:
    with pytest.raises(FileNotFoundError, match=r"'new' is registered but configs/toy_new_fast"):
        layouts.command("new", "1 rank")


def test_a_cell_that_holds_its_promises_has_no_shortfall() -> None:
    assert layouts.shortfalls("flux", "ulysses 2", GOOD, 0.95) == []
    identical = {**GOOD, "identical": True, "psnr_db": None}
    assert layouts.shortfalls("flux", "ulysses 2", identical, 0.95) == []
    replicas = {**GOOD, "parallel": {"data": 2}, "decisions_digest": {"0": "a", "1": "b"}}
    assert layouts.shortfalls("flux", "data 2", replicas, 0.95) == []


@pytest.mark.parametrize(
    ("change", "kept", "words"),
    [
        ({"psnr_db": 34.9}, 1.0, "PSNR 34.9 dB is below 35 dB"),
        ({"statistics": {"block_approx_ratio": 0.0}}, 1.0, "nothing was skipped"),
        ({"collectives_per_step": 1.5}, 1.0, "1.5 collectives a step"),
        ({"decisions_digest": {"0": "a", "1": "b"}}, 1.0, "decided differently"),
        ({}, 0.89, "keeps 89% of one rank's gain"),
        ({"pipeline_allows": 1.5}, 0.89, "(its pipeline allows 1.50x)"),
    ],
)
def test_each_broken_promise_is_said(change: dict[str, Any], kept: float, words: str) -> None:
    report = {**copy.deepcopy(GOOD), **change}
    (line,) = layouts.shortfalls("sd3", "cfg 2", report, kept)
    assert line.startswith("sd3, cfg 2: ")
    assert words in line


@pytest.mark.parametrize(("stages", "patches"), [(2, 2), (4, 4), (2, 8), (3, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_each_run_of_computed_steps_fills_the_pipeline_anew(
    stages: int, patches: int, seed: int
) -> None:
    chance = random.Random(seed)
    skipped = [False, *(chance.random() < 0.6 for _ in range(27))]
    runs = [len(list(run)) for skip, run in itertools.groupby(skipped[1:]) if not skip]
    taken = stages * patches + sum(run * patches + stages - 1 for run in runs)
    assert pipeline_slots(skipped, stages, patches, stagger=False) == taken


def test_staggered_stages_keep_the_pipeline_full() -> None:
    every_other = [False, *[False, True] * 20, False]
    aligned = pipeline_slots(every_other, 2, 2, stagger=False)
    staggered = pipeline_slots(every_other, 2, 2, stagger=True)
    # 4 for the first step; then 3 a pair of steps where the pipeline runs empty, else 2.
    assert aligned == 4 + 3 * 21
    assert staggered <= 4 + 2 * 21 + 2


@pytest.mark.parametrize("last", [True, False], ids=["last computed", "last skipped"])
def test_in_a_mask_every_stage_computes_as_often(last: bool) -> None:
    skipped = [False, True, True, False, True, True, False, True, True, not last]
    assert pipeline_slots(skipped, 2, 2, stagger=True, masked=True) == 4 + 2 * (2 + last)


@pytest.mark.slow
@pytest.mark.gloo
def test_the_command_writes_the_page(tmp_path: Path) -> None:
    """One cell for real; what xDiT cannot run is run as well, and its error compared."""
    page = tmp_path / "layouts.md"
    command = [sys.executable, "scripts/layouts.py", "--models", "pixart", "--layouts", "cfg 2"]
    command += ["--repeat", "1", "--captions", "0", "--sequences", "8"]
    command += ["--output_dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--output", str(page)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-4000:]
    text = page.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| pixart | cfg 2 | 2 |")]
    assert line.endswith("| 1.00 |")
    for exclusion in layouts.EXCLUDED:
        assert exclusion.sentence in text

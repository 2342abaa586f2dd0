"""Run every registered model in every layout, uncached and cached, and write down what came out.

    fastcache layouts                                               # all: docs/layouts.md
    fastcache layouts --models sd3 --layouts "1 rank" "cfg 2" --output runs/sd3.md

A cell is one run of scripts/generate.py on the model's embedded toy, under torchrun, with baseline
and cache in turn; reports and pictures stay under --output_dir. Exits with status 1 where a cell
falls short, after all have run; the page and the output list what and by how much. It needs a
checkout of the project, and writes into it.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from xfuser_fastcache.benchmarks.layouts import (
    ACCURACY_POINTS,
    EXCLUDED,
    LAYOUTS,
    ONE_RANK,
    cells,
    check_exclusion,
    run_captions,
    run_cell,
    shortfalls,
    toy_of,
)
from xfuser_fastcache.benchmarks.layouts_page import document, row
from xfuser_fastcache.calibration.checkout import ROOT, toys_of_checkout
from xfuser_fastcache.cli.flags import flags_of
from xfuser_fastcache.plugins import ADAPTERS, loaded


def main(arguments: list[str]) -> int:
    """Run the cells, write the page, list what falls short; return the exit status."""
    adapters = loaded(ADAPTERS)
    parser = flags_of("fastcache layouts", __doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(adapters))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS))
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each kind a cell")
    parser.add_argument(
        "--sequences",
        type=int,
        default=32,
        help="that a step computes at once: a picture is one, with guidance two (default 32)",
    )
    parser.add_argument(
        "--captions", type=int, default=64, help="unseen captions to mark a model; 0 for none"
    )
    parser.add_argument("--limit_s", type=float, default=600, help="limit of one command")
    parser.add_argument("--output_dir", default="runs/layouts", help="reports and pictures")
    parser.add_argument("--output", default="docs/layouts.md", help="the page")
    options = parser.parse_args(arguments)
    if toys_of_checkout() is None:
        parser.error("it runs the embedded toys, which a checkout of the project has; run it there")
    chosen = [
        (model, layout)
        for model, layout in cells()
        if model in (options.models or adapters) and layout in (options.layouts or LAYOUTS)
    ]
    console = Console()
    reports: dict[tuple[str, str], dict[str, Any]] = {}
    kept: dict[tuple[str, str], float] = {}
    accuracy: dict[str, dict[str, float]] = {}
    failures: list[str] = []

    def attempt(what: str, task: Any) -> Any:
        start = time.perf_counter()
        try:
            return task()
        except RuntimeError as error:
            failures.append(f"{what}: {error}")
            return None
        finally:
            console.print(f"{what}: {time.perf_counter() - start:.0f} s")

    for number, (model, layout) in enumerate(chosen, start=1):
        what = f"{number}/{len(chosen)} {model}, {layout}"
        report = attempt(what, lambda m=model, at=layout: run_cell(m, at, options))
        if report is None:
            continue
        reports[model, layout] = report
        single = reports.get((model, ONE_RANK))
        if single is not None and layout != ONE_RANK:
            kept[model, layout] = report["speedup"] / single["speedup"]
        failures += shortfalls(model, layout, report, kept.get((model, layout), 1.0))
        console.print(row(model, layout, report, kept.get((model, layout))), soft_wrap=True)
    alone = [model for model, layout in chosen if layout == ONE_RANK]
    for model in alone if options.captions else []:
        found = attempt(f"{model}, captions", lambda m=model: run_captions(m, options))
        if found is not None:
            accuracy[model] = found
            lost = found["baseline"] - found["cached"]
            if abs(lost) > ACCURACY_POINTS:
                failures.append(f"{model}: caption accuracy changes by {lost:.1f} points")
    for exclusion in (e for e in EXCLUDED if Path(toy_of(e.model)).exists()):
        what = f"{exclusion.model}, {exclusion.flag}, uncached"
        difference = attempt(what, lambda e=exclusion: check_exclusion(e, options))
        failures += [difference] if difference else []
    if reports:
        path = ROOT / options.output
        path.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["fastcache", "layouts", *arguments])
        path.write_text(document(reports, kept, accuracy, failures, options, command))
        console.print(f"{len(reports)} of {len(chosen)} cells in {options.output}")
    for failure in failures:
        console.print(f"[red]{failure}", soft_wrap=True)
    return 1 if failures else 0

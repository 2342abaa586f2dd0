"""Measure on fresh generations how often a calibration's skips do harm.

    fastcache audit runs/flux.safetensors --model toys/flux --seed 2 --report runs/audit.json

Runs each generation with the cache on, and every skipped step in full beside it. The prompts are
none of those that `fastcache calibrate` takes by itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from xfuser_fastcache.calibration.audit import audit, print_audit
from xfuser_fastcache.calibration.options import RunOptions, options_of
from xfuser_fastcache.calibration.prompts import AUDIT
from xfuser_fastcache.cli.flags import progress_of
from xfuser_fastcache.cli.recording import (
    parse_in_layout,
    prompts_of,
    recording_flags,
    runs_of,
    write_report,
)

GENERATIONS = 64


@torch.no_grad()
def main(arguments: list[str]) -> int:
    """Audit; return the exit status."""
    flags = recording_flags("audit", __doc__, default=str(GENERATIONS))
    flags.add_argument("calibration", type=Path, metavar="FILE", help="the calibration")
    flags.add_argument("--max_tokens", type=int, default=4096, help="recorded of a picture")
    flags.add_argument("--report", type=Path, help="JSON to write")
    given, layout = parse_in_layout(flags, arguments)
    console = Console(width=100)
    prompts = prompts_of(given, AUDIT, GENERATIONS)
    with runs_of(options_of(RunOptions, given), layout, prompts) as runs:
        progress = progress_of(given, shown=runs.team.first)
        report = audit(runs, given.calibration, progress)
        if runs.team.first:
            print_audit(report, console)
            write_report(given.report, report)
    return 0

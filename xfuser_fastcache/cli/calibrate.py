"""Calibrate a cache for one model, scheduler and number of steps.

    fastcache calibrate --model toys/flux --cache_ratio_threshold 0.05 --seed 1 \\
        --output runs/flux.safetensors
    fastcache audit runs/flux.safetensors --model toys/flux --seed 2

Records generations with full computation, fits corrections of the output forecast and the gate's
thresholds, searches masks of computed steps, and records again with the cache on. A run that was
broken off goes on where it stopped when the same command is given again. A model that needs several
GPUs is calibrated where it is served, with xDiT's flags of its layout; the file is the same:

    torchrun --nproc_per_node=2 -m xfuser_fastcache.cli calibrate --ulysses_degree 2 \\
        --model toys/flux --output runs/flux.safetensors

It serves every layout. Then:

    CacheConfig(calibration="runs/flux.safetensors", significance_level=0.05)   # the gate decides
    CacheConfig(calibration="runs/flux.safetensors", computed_steps=7)          # a searched mask
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from xfuser_fastcache.calibration.build import generations_needed
from xfuser_fastcache.calibration.masks import print_masks
from xfuser_fastcache.calibration.options import CalibrationOptions, options_of
from xfuser_fastcache.calibration.prompts import CALIBRATE
from xfuser_fastcache.calibration.settle import calibrate
from xfuser_fastcache.cli.flags import progress_of
from xfuser_fastcache.cli.recording import (
    parse_in_layout,
    prompts_of,
    recording_flags,
    runs_of,
    write_report,
)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, argparse.Namespace | None]:
    """Read the command line; see `parse_in_layout`."""
    flags = recording_flags("calibrate", __doc__, default="what alpha needs")
    flags.add_argument(
        "--cache_ratio_threshold",
        type=float,
        default=0.05,
        help="epsilon: relative error of the output from which on a skip does harm (default 0.05)",
    )
    flags.add_argument(
        "--significance_level",
        type=float,
        nargs="+",
        default=[0.05],
        help="alpha: share of harmful skips that is allowed; several give one file for all",
    )
    flags.add_argument(
        "--computed_steps",
        type=int,
        nargs="*",
        default=[],
        help="also search masks of so many computed steps",
    )
    flags.add_argument(
        "--moves", type=int, default=32, help="masks tried around each best one (default 32)"
    )
    flags.add_argument(
        "--start_from", type=Path, help="a calibration whose masks the search is to better"
    )
    flags.add_argument(
        "--batch_size",
        type=int,
        default=40,
        help="pictures that masks are fitted and tried on at once, 2 or more (default 40)",
    )
    flags.add_argument("--max_lag", type=int, default=10, help="largest gap looked at (default 10)")
    flags.add_argument("--max_tokens", type=int, default=4096, help="recorded of a picture")
    flags.add_argument("--output", type=Path, required=True, help="the file to write")
    flags.add_argument("--report", type=Path, help="JSON of the scales and masks that were tried")
    options, layout = parse_in_layout(flags, arguments)
    steps = options.num_inference_steps
    wrong = [count for count in options.computed_steps if not 1 <= count <= steps]
    if wrong:
        flags.error(f"--computed_steps {wrong[0]}: give 1 to {steps}, the --num_inference_steps")
    if options.start_from is not None and not options.computed_steps:
        flags.error("--start_from betters masks: say of how many steps with --computed_steps")
    if options.batch_size < 2:
        flags.error(f"--batch_size {options.batch_size}: give 2 or more, to fit on and to try on")
    return options, layout


@torch.no_grad()
def main(arguments: list[str]) -> int:
    """Calibrate; return the exit status."""
    given, layout = parse(arguments)
    options = options_of(CalibrationOptions, given)
    console = Console(width=100)
    needed = generations_needed(options.significance_level)
    prompts = prompts_of(given, CALIBRATE, needed)
    if len(prompts) < needed:
        raise ValueError(
            f"{len(prompts)} generations, but alpha = {min(options.significance_level)} "
            f"needs {needed}: give more prompts or allow a larger --significance_level"
        )
    with runs_of(options, layout, prompts) as runs:
        first = runs.team.first
        fitted, report = calibrate(runs, options, progress_of(given, shown=first))
        if first:
            fitted.save(options.output)
            console.print(f"written: {options.output}", markup=False, soft_wrap=True)
            console.print(f"scales: {fitted.scales}", markup=False)
            if "masks" in report:
                print_masks(report["masks"], fitted, console)
            write_report(given.report, report)
    return 0

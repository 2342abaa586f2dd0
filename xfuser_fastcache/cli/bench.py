"""Compare every cache, and fewer steps without one, side by side on one model.

    fastcache bench --model toys/flux --output_dir runs/bench          # everything
    fastcache bench --model toys/flux --methods fast fewer-steps \\
        diffusers-fbcache:0.05,0.1 --num_prompts 8 --output_dir runs/few
    fastcache bench --model toys/flux --layout ulysses=2 --output_dir runs/ulysses

Each method is swept over its own setting; the uncached run and all settings take turns on one
batch of prompts after the other. Ctrl-C keeps what is measured, --resume goes on. cache-dit needs
the extra `bench`; what cannot run is listed with its own error.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from xfuser_fastcache.benchmarks import report
from xfuser_fastcache.benchmarks.methods import choose
from xfuser_fastcache.benchmarks.rounds import measure, prepare, try_alone
from xfuser_fastcache.benchmarks.settings import (
    TOY_PROMPTS,
    Settings,
    calibration_of,
    parse_layout,
)
from xfuser_fastcache.calibration.checkout import is_toy, toys_of_checkout
from xfuser_fastcache.calibration.prompts import AUDIT, draws_clips, prompts_for, read_prompts
from xfuser_fastcache.cli.flags import flags_of, progress_flags, progress_of
from xfuser_fastcache.xdit.loaded import DTYPES, call_arguments


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read as transformers is imported
    flags = flags_of("fastcache bench", __doc__)
    flags.add_argument("--model", required=True, help="a diffusers folder or hub name")
    flags.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME[:SETTING,...]",
        help="default all; backends: each of ours; forecasters, tokens: ours with each forecaster "
        "or token plan under the gate of `fast`; budgets: with each forecaster at evenly spaced "
        "steps; an unknown name lists the known ones",
    )
    flags.add_argument(
        "--prompts",
        type=Path,
        help="a file, one a line; default toys/prompts_64.txt for an embedded toy, else shipped "
        "ones",
    )
    flags.add_argument("--num_prompts", type=int, help="the first of them; else 64")
    flags.add_argument("--seed", type=int, help="fresh prompts, and other noise")
    flags.add_argument("--num_inference_steps", type=int, default=28)
    flags.add_argument("--converged", type=int, default=10, help="times the steps (default 10)")
    flags.add_argument("--batch_size", type=int, default=4, help="prompts of a round (default 4)")
    flags.add_argument(
        "--call",
        type=json.loads,
        help="JSON with further arguments of the pipeline's call; default MODEL/call.json",
    )
    flags.add_argument("--dtype", choices=DTYPES, help="default bfloat16, float32 without a GPU")
    progress_flags(flags)
    flags.add_argument("--layout", default="", help='such as "ulysses=2" or "cfg=2,pipefusion=2"')
    flags.add_argument(
        "--workers", type=int, help="processes that share the rounds; default 2, on a GPU 1"
    )
    flags.add_argument(
        "--at_psnr",
        type=lambda text: [float(level) for level in text.split(",")],
        default=[40.0, 45.0, 50.0, 55.0],
        help="levels in dB (default 40,45,50,55)",
    )
    flags.add_argument("--output_dir", type=Path, required=True)
    flags.add_argument(
        "--calibration", help="of fastcache calibrate; default MODEL/fastcache.safetensors"
    )
    flags.add_argument("--resume", action="store_true", help="go on with what OUTPUT_DIR holds")
    return flags.parse_args(arguments)


def settings_from(options: argparse.Namespace) -> Settings:
    """Turn the command line into settings.

    Raises:
        ValueError: contradicting or unknown values.
    """
    if options.prompts and options.seed is not None:
        raise ValueError(
            "--prompts gives the prompts and --seed draws fresh ones; give one of them"
        )
    toys = toys_of_checkout() if is_toy(options.model) else None
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, options.num_prompts)
    elif options.seed is None and toys is not None and not draws_clips(options.model):
        prompts = read_prompts(toys / TOY_PROMPTS, options.num_prompts)
    else:
        prompts = prompts_for(options.model, AUDIT, options.num_prompts or 64, options.seed or 0)
    layout = parse_layout(options.layout)
    on_gpu = torch.cuda.is_available()
    alone = on_gpu or bool(layout)
    if alone and options.workers not in (None, 1):
        raise ValueError(
            f"--workers {options.workers}: a GPU or a layout is measured by one worker at a time"
        )
    workers = 1 if alone else min(options.workers or 2, os.cpu_count() or 1)
    rounds = -(-len(prompts) // options.batch_size)
    return Settings(
        model=options.model,
        prompts=prompts,
        methods=choose(options.methods, options.num_inference_steps),
        steps=options.num_inference_steps,
        converged=options.converged,
        batch_size=options.batch_size,
        call=call_arguments(options.model) if options.call is None else options.call,
        seed=options.seed or 0,
        dtype=options.dtype or ("bfloat16" if on_gpu else "float32"),
        layout=layout,
        workers=min(workers, rounds),
        calibration=options.calibration or calibration_of(options.model),
    )


def print_summary(result: dict[str, Any], console: Console) -> None:
    """Print speedups at levels of quality, quality at numbers of steps, and what could not run."""
    tables = [
        ("speedup_at_psnr", "speedup at a PSNR against the uncached run", "{} dB", "{:.2f}x"),
        ("psnr_at_computed_steps", "PSNR in dB at so many computed steps", "{}", "{:.1f}"),
    ]
    for key, title, head, cell in tables:
        levels = result[key]
        table = Table(title=f"{report.title_of(result)}: {title}")
        table.add_column("method")
        for level in levels:
            table.add_column(head.format(level), justify="right")
        for name in result["points"]:
            row = [levels[level][name] for level in levels]
            table.add_row(name, *("-" if x is None else cell.format(x) for x in row))
        console.print(table)
    for name, error in result["errors"].items():
        console.print(f"{name} could not run: {error}", markup=False)


def main(arguments: list[str]) -> int:
    """Run the comparison; return the exit status."""
    options = parse(arguments)
    console = Console(width=100)
    settings = settings_from(options)
    prepare(settings, options.output_dir, options.resume)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    directory = options.output_dir
    status = 0
    try:
        if settings.layout:
            try_alone(settings, directory, console)
        measure(settings, directory, progress_of(options))
    except KeyboardInterrupt:
        console.print("interrupted; the same command with --resume goes on", style="yellow")
        status = 130
    except RuntimeError as error:
        console.print(f"fastcache bench: {error}", style="red", markup=False)
        status = 1
    command = shlex.join(["fastcache", "bench", *arguments])
    try:
        result = report.build(directory, options.at_psnr, command)
    except ValueError as error:
        console.print(f"fastcache bench: {error}", style="red", markup=False)
        return status or 1
    paths = report.write(result, directory)
    print_summary(result, console)
    console.print(f"written: {', '.join(map(str, paths))}", markup=False, soft_wrap=True)
    return status

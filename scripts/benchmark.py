#!/usr/bin/env python3
"""Compare every cache, and fewer steps without one, side by side on one model.

    python scripts/benchmark.py --model toys/flux --output_dir runs/bench          # everything
    python scripts/benchmark.py --model toys/flux --methods fast fewer-steps \\
        diffusers-fbcache:0.05,0.1 --num_prompts 8 --output_dir runs/few
    python scripts/benchmark.py --model toys/flux --layout ulysses=2 --output_dir runs/ulysses

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
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read as transformers is imported

import torch
from _bench import report
from _bench.methods import choose
from _bench.settings import (
    PROMPTS,
    ROOT,
    Settings,
    calibration_of,
    call_arguments,
    parse_layout,
    read_prompts,
)
from _bench.subject import DTYPES
from _bench.worker import read_records
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from toys.captions import sample_captions

# A method that is tried alone in a layout and has not ended by then waits for another rank.
TRY_LIMIT_S = 180


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", required=True, help="a diffusers folder or hub name")
    flags.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME[:SETTING,...]",
        help="default all; backends: each of ours; forecasters, tokens: ours with each forecaster "
        "or token plan under the gate of `fast`; an unknown name lists the known ones",
    )
    flags.add_argument(
        "--prompts", type=Path, help="a file, one a line; default toys/prompts_64.txt"
    )
    flags.add_argument("--num_prompts", type=int, help="the first of them; with --seed 64")
    flags.add_argument("--seed", type=int, help="fresh captions of the toys, and other noise")
    flags.add_argument("--num_inference_steps", type=int, default=28)
    flags.add_argument("--converged", type=int, default=10, help="times the steps (default 10)")
    flags.add_argument("--batch_size", type=int, default=4, help="prompts of a round (default 4)")
    flags.add_argument(
        "--call",
        type=json.loads,
        help="JSON with further arguments of the pipeline's call; the embedded toys know theirs",
    )
    flags.add_argument("--dtype", choices=DTYPES, help="default bfloat16, float32 without a GPU")
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
        "--calibration", help="of scripts/calibrate.py; default MODEL/fastcache.safetensors"
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
    if options.seed is not None:
        prompts = sample_captions(options.num_prompts or 64, seed=options.seed, split="unseen")
    else:
        prompts = read_prompts(options.prompts or PROMPTS, options.num_prompts)
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


def prepare(settings: Settings, directory: Path, resume: bool) -> None:
    """Make the folder of the run, or check that it holds the same run.

    Raises:
        FileExistsError: there is a run and `resume` was not asked for.
        ValueError: the run there has other settings.
    """
    path = directory / "settings.json"
    if path.exists():
        if not resume:
            raise FileExistsError(
                f"{directory} holds a run already; give --resume to go on with it, or another "
                "--output_dir"
            )
        different = settings.differences(Settings.read(path))
        if different:
            raise ValueError(
                f"{directory} holds a run with another {', '.join(different)}; give the same "
                "flags to go on with it, or another --output_dir"
            )
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    settings.write(path)


def command_of(settings: Settings, directory: Path, *arguments: str) -> list[str]:
    """The command of one worker, under torchrun where there is a layout."""
    launcher = [sys.executable]
    if settings.layout:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={settings.ranks}"]
    return [*launcher, "-m", "_bench.worker", str(directory), *arguments]


def surroundings() -> dict[str, str]:
    """Environment of the workers: one thread a process unless the user says otherwise, quiet."""
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    quiet = {"LOG_LEVEL": "warning", "TRANSFORMERS_VERBOSITY": "error"}
    return {"OMP_NUM_THREADS": "1", **quiet, **os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}


def end(process: subprocess.Popen[str]) -> None:
    """Let a worker end; torchrun ends its ranks when it is asked to."""
    if process.poll() is None:
        process.terminate()
        process.wait()


def last_error(log: Path) -> str:
    """The last line of a log that names an error, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # torchrun prefixes the ranks' lines.
    lines = [line.split("]:", 1)[-1] if line.startswith("[rank") else line for line in lines]
    named = [line for line in lines if "Error: " in line or line.endswith("Error")]
    return (named or lines or ["it printed nothing"])[0].strip()[:400]


def try_alone(settings: Settings, directory: Path, console: Console) -> None:
    """Run every method once in processes of its own, and list the errors of those that fail.

    In a layout an error on one rank leaves the others waiting, and with them the whole comparison.
    """
    path = directory / "records.try.jsonl"
    if path.exists():
        return
    errors = {}
    for name in settings.methods:
        console.print(f"trying {name} on {settings.ranks} ranks")
        log = directory / f"try_{name}.log"
        with log.open("w") as stream, subprocess.Popen(
            command_of(settings, directory, "0", "--try", name),
            cwd=ROOT, env=surroundings(), stdout=stream, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            try:
                if process.wait(TRY_LIMIT_S):
                    errors[name] = last_error(log)
            except subprocess.TimeoutExpired:
                errors[name] = f"ranks still waited for each other after {TRY_LIMIT_S} s"
            finally:
                end(process)
    records = [
        {"kind": "error", "method": name, "value": value, "error": error}
        for name, error in errors.items()
        for value in settings.methods[name]
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def measure(settings: Settings, directory: Path, console: Console) -> None:
    """Run the workers to their end, with a progress bar.

    Raises:
        RuntimeError: a worker failed; with the end of its log.
        KeyboardInterrupt: the workers are ended, their records are whole.
    """
    total = len(settings.rounds) * sum(len(values) for values in settings.methods.values())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    logs = [directory / f"worker_{worker}.log" for worker in range(settings.workers)]
    streams = [log.open("a") for log in logs]
    workers = [
        subprocess.Popen(
            command_of(settings, directory, str(worker)),
            cwd=ROOT,
            env=surroundings(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for worker, stream in enumerate(streams)
    ]
    try:
        with Progress(*columns, console=console, speed_estimate_period=600) as progress:
            task = progress.add_task("measuring", total=total)
            while True:
                running = [worker.poll() is None for worker in workers]
                progress.update(task, completed=measured(settings, directory))
                failed = [w for w, worker in enumerate(workers) if worker.poll()]
                if failed:
                    text = logs[failed[0]].read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"worker {failed[0]} failed, see {logs[failed[0]]}\n{text}")
                if not any(running):
                    break
                time.sleep(0.5)
    finally:
        for worker in workers:
            end(worker)
        for stream in streams:
            stream.close()


def measured(settings: Settings, directory: Path) -> int:
    """Settings times rounds that are measured or will never be, for the progress bar."""
    records = read_records(directory)
    failed = {(r["method"], r["value"]) for r in records if r["kind"] == "error"}
    points = {
        (r["round"], r["method"], r["value"])
        for r in records
        if r["kind"] == "point" and r["method"] != "baseline"
    }
    left = {point for point in points if point[1:] not in failed}
    return len(left) + len(failed) * len(settings.rounds)


def print_summary(result: dict[str, Any], console: Console) -> None:
    """Print speedups at the levels, and what could not run."""
    levels = result["speedup_at_psnr"]
    table = Table(title=f"{report.title_of(result)}: speedup at a PSNR against the uncached run")
    table.add_column("method")
    for level in levels:
        table.add_column(f"{level} dB", justify="right")
    for name in result["points"]:
        row = [levels[level][name] for level in levels]
        table.add_row(name, *("-" if x is None else f"{x:.2f}x" for x in row))
    console.print(table)
    for name, error in result["errors"].items():
        console.print(f"{name} could not run: {error}", markup=False)


def main(arguments: list[str]) -> int:
    """Run the comparison; return the exit status."""
    options = parse(arguments)
    console = Console(width=100)
    try:
        settings = settings_from(options)
        prepare(settings, options.output_dir, options.resume)
    except (ValueError, FileExistsError) as error:
        console.print(f"benchmark.py: {error}", style="red", markup=False)
        return 2

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    command = shlex.join(["python", "scripts/benchmark.py", *arguments])
    directory = options.output_dir
    status = 0
    try:
        if settings.layout:
            try_alone(settings, directory, console)
        measure(settings, directory, console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command with --resume goes on", style="yellow")
        status = 130
    except RuntimeError as error:
        console.print(f"benchmark.py: {error}", style="red", markup=False)
        status = 1
    try:
        result = report.build(directory, options.at_psnr, command)
    except ValueError as error:
        console.print(f"benchmark.py: {error}", style="red", markup=False)
        return status or 1
    paths = report.write(result, directory)
    print_summary(result, console)
    console.print(f"written: {', '.join(map(str, paths))}", markup=False, soft_wrap=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

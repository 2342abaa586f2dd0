"""Runs the workers of a benchmark to their end, and says how far they are."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from xfuser_fastcache.benchmarks.processes import end, last_error, spawn
from xfuser_fastcache.benchmarks.settings import Settings
from xfuser_fastcache.benchmarks.worker import outcomes, read_records
from xfuser_fastcache.reports.progress import Progress

# A method that is tried alone in a layout and has not ended by then waits for another rank.
TRY_LIMIT_S = 180


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
    return [*launcher, "-m", "xfuser_fastcache.benchmarks.worker", str(directory), *arguments]


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
        command = command_of(settings, directory, "0", "--try", name)
        with log.open("w") as stream, spawn(command, stdout=stream) as process:
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


def measure(settings: Settings, directory: Path, progress: Progress) -> None:
    """Run the workers to their end.

    Raises:
        RuntimeError: a worker failed; with the end of its log.
        KeyboardInterrupt: the workers are ended, their records are whole.
    """
    total = len(settings.rounds) * sum(len(values) for values in settings.methods.values())
    logs = [directory / f"worker_{worker}.log" for worker in range(settings.workers)]
    streams = [log.open("a") for log in logs]
    workers = [
        spawn(command_of(settings, directory, str(worker)), stdout=stream)
        for worker, stream in enumerate(streams)
    ]
    try:
        with progress.task("measuring", total) as task:
            while True:
                running = [worker.poll() is None for worker in workers]
                task.reach(measured(settings, directory))
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
    """Settings times rounds that are measured or will never be, for the progress."""
    failed, points = outcomes(read_records(directory))
    left = [point for point in points if point[1] != "baseline" and point[1:] not in failed]
    return len(left) + len(failed) * len(settings.rounds)

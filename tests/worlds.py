"""Starts worlds of real ranks for the tests, each with a limit, and collects what they report.

A worker is a script that prints one JSON object a rank on lines that begin with `REPORT `.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class WorldFailed(AssertionError):
    """A world that ended with an error or ran past its limit; carries what it printed."""

    def __init__(self, message: str, output: str, timed_out: bool):
        super().__init__(f"{message}\n{output[-6000:]}")
        self.output = output
        self.timed_out = timed_out


def run_world(
    script: str, ranks: int, *arguments: str, timeout_s: float = 240.0
) -> dict[int, dict[str, Any]]:
    """Run `tests/<script>` under torchrun and return each rank's report.

    Args:
        script: file name in tests/.
        ranks: number of processes.
        *arguments: of the script.
        timeout_s: the world is killed after it, with all its processes.

    Raises:
        WorldFailed: non-zero exit, time over, or a rank without a report.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={ranks}", str(ROOT / "tests" / script), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    timed_out = False
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
    name = f"{script} {' '.join(arguments)} on {ranks} ranks"
    if timed_out:
        raise WorldFailed(f"{name} was killed after {timeout_s} s", output, timed_out=True)
    if process.returncode:
        raise WorldFailed(f"{name} exited with {process.returncode}", output, timed_out=False)
    reports = {}
    for line in output.splitlines():
        if line.startswith("REPORT "):
            report = json.loads(line.removeprefix("REPORT "))
            reports[report["rank"]] = report
    if sorted(reports) != list(range(ranks)):
        raise WorldFailed(f"{name}: reports of ranks {sorted(reports)} only", output, False)
    return reports


def report(rank: int, **values: Any) -> None:
    """Print a worker's report."""
    sys.stdout.write(f"REPORT {json.dumps({'rank': rank, **values})}\n")
    sys.stdout.flush()

"""Starts worlds of real ranks for the tests, each with a limit, and collects what they report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_REPORT = "REPORT "


class WorldFailed(AssertionError):
    """A world that ended with an error or ran past its limit.

    Attributes:
        output: everything that its ranks printed.
        timed_out: whether it was ended by its limit.
    """

    def __init__(self, message: str, output: str, timed_out: bool):
        super().__init__(f"{message}\n{output[-6000:]}")
        self.output = output
        self.timed_out = timed_out


def launch(script: str | Path, ranks: int, *arguments: str, timeout_s: float = 240.0) -> str:
    """Run a script of tests/ under torchrun and return what its ranks printed.

    Args:
        script: file name in tests/, or a path.
        ranks: number of processes on this machine.
        *arguments: of the script.
        timeout_s: seconds after which the ranks are ended.

    Raises:
        WorldFailed: non-zero exit, or time over.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={ranks}", str(ROOT / "tests" / script), *arguments,
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    name = f"{script} {' '.join(arguments)} on {ranks} ranks"
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            # torchrun ends its ranks when it is asked to; killed, it would leave them running.
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate()
            raise WorldFailed(f"{name}: ended after {timeout_s} s", output, True) from None
    if process.returncode:
        raise WorldFailed(f"{name}: exited with {process.returncode}", output, False)
    return output


def run_world(
    script: str | Path, ranks: int, *arguments: str, timeout_s: float = 240.0
) -> dict[int, dict[str, Any]]:
    """Run a script as `launch` does, and return what each rank handed to `report`.

    Raises:
        WorldFailed: also where a rank reported nothing.
    """
    output = launch(script, ranks, *arguments, timeout_s=timeout_s)
    reports = {}
    for line in output.splitlines():
        if line.startswith(_REPORT):
            values = json.loads(line.removeprefix(_REPORT))
            reports[values["rank"]] = values
    if sorted(reports) != list(range(ranks)):
        raise WorldFailed(f"{script}: reports of ranks {sorted(reports)} only", output, False)
    return reports


def report(rank: int, **values: Any) -> None:
    """Print a worker's report, in one write so that ranks do not mix."""
    sys.stdout.write(f"\n{_REPORT}{json.dumps({'rank': rank, **values})}\n")
    sys.stdout.flush()

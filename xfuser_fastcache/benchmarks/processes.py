"""Processes of a benchmark: started alike whatever started this one, and ended when asked to."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from xfuser_fastcache.calibration.checkout import ROOT

# The libraries' chatter would hide what the processes say.
QUIET = {"LOG_LEVEL": "warning", "TRANSFORMERS_VERBOSITY": "error"}


def spawn(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a quiet process of one thread that answers SIGINT and SIGTERM, output in text.

    A process that a shell starts in the background ignores SIGINT, and so do those that it starts.

    Args:
        command: that is run.
        **options: of `subprocess.Popen`.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"OMP_NUM_THREADS": "1", **QUIET, **os.environ, "PYTHONPATH": path}
    given = {"env": environment, "stderr": subprocess.STDOUT, **options}
    return subprocess.Popen(command, text=True, preexec_fn=_answer_signals, **given)


def _answer_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def end(process: subprocess.Popen[str]) -> None:
    """Let a process end; torchrun ends its ranks when it is asked to, and killed leaves them."""
    if process.poll() is None:
        process.terminate()
        process.wait()


def last_error(log: Path) -> str:
    """Return the first line of a log that names an error, or its first line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # torchrun prefixes the ranks' lines.
    lines = [line.split("]:", 1)[-1] if line.startswith("[rank") else line for line in lines]
    named = [line for line in lines if "Error: " in line or line.endswith("Error")]
    return (named or lines or ["it printed nothing"])[0].strip()[:400]

"""Starts scripts/serve.py on real ranks for the tests, by its launcher or forked, and ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from support.worlds import ROOT, WorldFailed, begin

_READY = re.compile(r"serving .* on (http://\S+) with .* kill (\d+)")
START_S = 180.0
Start = Callable[..., Any]
_LEFT = re.compile(r"rank (\d+) has left")


class Forked:
    """What a `subprocess.Popen` is to a service, of ranks that are forked as worlds are.

    Args:
        printed: file that what they print is added to.
        ranks: number of processes.
        *flags: of scripts/serve.py.
    """

    def __init__(self, printed: str, ranks: int, *flags: str):
        self._world = begin(ROOT / "scripts" / "serve.py", ranks, *flags, printed=printed)
        assert self._world.pid is not None
        self.pid: int = self._world.pid

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""
        return self._world.exitcode

    def wait(self, seconds: float) -> int:
        """Return the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after `seconds`.
        """
        self._world.join(seconds)
        if self._world.exitcode is None:
            raise subprocess.TimeoutExpired("serve", seconds)
        return self._world.exitcode

    def terminate(self) -> None:
        """Ask it to end; its ranks end with it."""
        self._world.terminate()


def launched(printed: str, ranks: int, *flags: str) -> subprocess.Popen[bytes]:
    """Start a service as an operator does, with all imports of its own; see `Forked`."""
    launcher = str(ROOT / "scripts" / "launch_single_node.sh")
    environment = {"FASTCACHE_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(printed, "ab") as file:
        return subprocess.Popen(
            ["bash", launcher, "serve", "--nproc_per_node", str(ranks), *flags],
            cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


class Served:
    """A running service.

    Args:
        ranks: number of processes on this machine.
        *flags: of scripts/serve.py; the port is chosen.
        start: `Forked`, or `launched`.

    Attributes:
        url: where it answers.
        leader: process id of rank 0.
    """

    def __init__(self, ranks: int, *flags: str, start: Start = Forked):
        self._printed = tempfile.NamedTemporaryFile("r")
        self.process = start(self._printed.name, ranks, "--port", "0", *flags)
        try:
            found = self.expect(_READY, START_S)
        except WorldFailed:
            self.end()
            raise
        self.url, self.leader = found[1], int(found[2])
        self.client = httpx.Client(base_url=self.url, timeout=120)

    @property
    def output(self) -> str:
        """What the ranks have printed so far."""
        self._printed.seek(0)
        return self._printed.read()

    def expect(self, pattern: re.Pattern[str], seconds: float) -> re.Match[str]:
        """Wait for a line in the output.

        Raises:
            WorldFailed: it does not come in time, or the service has ended without it.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            ended = self.process.poll() is not None
            found = pattern.search(self.output)
            if found:
                return found
            if ended:
                raise WorldFailed(f"ended without {pattern.pattern!r}", self.output, False)
            time.sleep(0.05)
        raise WorldFailed(f"no {pattern.pattern!r} in {seconds} s", self.output, True)

    def ranks(self) -> dict[int, int]:
        """Process ids by rank: they are started one after the other."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it has ended meanwhile
            if int(fields[1]) == self.process.pid:
                found.append((int(fields[19]), int(stat.parent.name)))
        return {rank: process for rank, (_, process) in enumerate(sorted(found))}

    def draw(self, prompt: str = "a large red ring, top left, on dark blue", **body: Any) -> Any:
        """POST /generate and return the response."""
        return self.client.post("/generate", json={"prompt": prompt, **body})

    def drawn(self, **body: Any) -> dict[str, Any]:
        """The same, for requests that must succeed; returns the body."""
        response = self.draw(**{"seed": 1, **body})
        assert response.status_code == 200, (response.text, self.output[-3000:])
        return response.json()

    def statistics(self) -> dict[str, Any]:
        """GET /statistics."""
        return self.client.get("/statistics").json()

    def left(self) -> list[int]:
        """The ranks that have said goodbye."""
        return sorted(map(int, _LEFT.findall(self.output)))

    def stop(self, seconds: float = 60.0) -> int:
        """Send SIGTERM to rank 0 and return the launcher's exit status."""
        os.kill(self.leader, signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float = 60.0) -> int:
        """Return the launcher's exit status.

        Raises:
            WorldFailed: it still runs after `seconds`.
        """
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise WorldFailed(f"still running after {seconds} s", self.output, True) from None
        return status

    def end(self) -> None:
        """End it whatever it does; torchrun ends its ranks when it is asked to."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

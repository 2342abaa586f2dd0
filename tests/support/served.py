"""Starts scripts/serve.py on real ranks for the tests, and ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from support.worlds import ROOT, WorldFailed

_READY = re.compile(r"serving .* on (http://\S+) with .* kill (\d+)")
_LEFT = re.compile(r"rank (\d+) has left")


class Served:
    """A running service.

    Args:
        ranks: number of processes on this machine.
        *flags: of scripts/serve.py; the port is chosen.
        start_s: longest wait for its first answer, in seconds.

    Attributes:
        url: where it answers.
        leader: process id of rank 0.
    """

    def __init__(self, ranks: int, *flags: str, start_s: float = 180.0):
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [
                "bash", str(ROOT / "scripts" / "launch_single_node.sh"), "serve",
                "--nproc_per_node", str(ranks), "--port", "0", *flags,
            ],
            cwd=ROOT,
            env={
                **os.environ, "FASTCACHE_VENV": sys.prefix, "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            found = self.expect(_READY, start_s)
        except WorldFailed:
            self.end()
            raise
        self.url, self.leader = found[1], int(found[2])
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        """What the ranks have printed so far."""
        return "".join(self.lines)

    def expect(self, pattern: re.Pattern[str], seconds: float) -> re.Match[str]:
        """Wait for a line in the output.

        Raises:
            WorldFailed: it does not come in time, or the service has ended without it.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(5)
            found = pattern.search(self.output)
            if found:
                return found
            if ended:
                raise WorldFailed(f"ended without {pattern.pattern!r}", self.output, False)
            time.sleep(0.05)
        raise WorldFailed(f"no {pattern.pattern!r} in {seconds} s", self.output, True)

    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                environment = (status.parent / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended meanwhile
            if int(fields["PPid"]) == self.process.pid:
                (rank,) = [v[5:] for v in environment if v.startswith(b"RANK=")]
                found[int(rank)] = int(fields["Pid"])
        return found

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
        self._reader.join(5)
        return status

    def end(self) -> None:
        """End it whatever it does; torchrun ends its ranks when it is asked to."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        self._reader.join(5)

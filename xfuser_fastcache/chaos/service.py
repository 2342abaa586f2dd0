"""A service of a toy, in a process of its own, for requests that mean it no good."""

from __future__ import annotations

import atexit
import ctypes
import functools
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfuser_fastcache.calibration.checkout import toys_of_checkout

_READY = re.compile(r"serving .* on http://127\.0\.0\.1:(\d+) ")
START_S = 300.0
# A request that is not answered for so long has frozen the service.
PATIENCE_S = 60.0
READ_TIMEOUT_S = 2.0
MAX_SIDE = 128
MAX_STEPS = 6
QUEUE_SIZE = 4
OWN = {"prompt": "a large red ring, top left, on dark blue", "seed": 1}
_FLAGS = (
    *("--height", "64", "--width", "64", "--num_inference_steps", "4"),
    *("--max_sequence_length", "32", "--dtype", "float32", "--port", "0"),
    *("--use_cache", "Fast", "--cache_config", '{"cache_ratio_threshold": 0.5}'),
    *("--max_side", str(MAX_SIDE), "--max_steps", str(MAX_STEPS)),
    *("--queue_size", str(QUEUE_SIZE), "--read_timeout_s", str(READ_TIMEOUT_S)),
)
_IN_ACCESS, _IN_OPEN = 0x1, 0x20


class Broken(Exception):
    """The service is not what it was; the message says in what."""


@dataclass(frozen=True)
class Answered:
    """What came back.

    Attributes:
        status: of HTTP; 0 where the connection ended without an answer.
        body: as it came.
        kind: its media type.
    """

    status: int
    body: bytes = b""
    kind: str = ""

    @property
    def detail(self) -> str:
        """The reason of a refusal, or what came in its place."""
        if self.kind != "application/json":
            text = self.kind.startswith("text/")
            return self.body[:200].decode() if text else f"{len(self.body)} bytes of {self.kind}"
        found = json.loads(self.body).get("detail", "")
        return found if isinstance(found, str) else repr(found)


class Opens:
    """Tells which files of a folder any process has opened, as the kernel sees it (inotify).

    Args:
        folder: watched.
    """

    def __init__(self, folder: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._end = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        watch = libc.inotify_add_watch(self._end, os.fsencode(folder), _IN_ACCESS | _IN_OPEN)
        if self._end < 0 or watch < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {folder}")

    def seen(self) -> int:
        """Return the number of bytes of events since the last call; 0 for none."""
        try:
            return len(os.read(self._end, 1 << 16))
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Watch no more."""
        os.close(self._end)


class Target:
    """A running service.

    Attributes:
        folder: of files that no request may open: `file`, `fifo`, the folder `folder`.
        picture: of the request `OWN`, which no other request changes.

    Raises:
        ValueError: outside of a checkout, which has the toys.
        Broken: it does not start.
    """

    def __init__(self) -> None:
        toys = toys_of_checkout()
        if toys is None:
            raise ValueError("--requests needs a checkout of the project, which has the toys")
        self._own = Path(tempfile.mkdtemp(prefix="fastcache-chaos-"))
        self.folder = self._own / "files"
        self.folder.mkdir()
        (self.folder / "file").write_text("secret")
        (self.folder / "folder").mkdir()
        os.mkfifo(self.folder / "fifo")
        self.opens = Opens(self.folder)
        with socket.create_server(("127.0.0.1", 0)) as door:
            rendezvous = str(door.getsockname()[1])
        self.log = self._own / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "xfuser_fastcache.cli",
                    "serve",
                    "--model",
                    str(toys / "flux"),
                ]
                + [*_FLAGS],
                env={**os.environ, "MASTER_PORT": rendezvous, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        atexit.register(self.end)
        self.address = ("127.0.0.1", self._port())
        self.picture = self.post(json.dumps(OWN).encode()).body
        self.check()

    def _port(self) -> int:
        until = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < until:
            found = _READY.search(self.said())
            if found:
                return int(found[1])
            time.sleep(0.1)
        self.end()
        raise Broken(f"the service did not start: {self.said()[-2000:]}")

    def said(self) -> str:
        """Return what it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answered:
        """Send a request and return its answer.

        Raises:
            Broken: no answer in time.
        """
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            kind = answer.getheader("content-type") or ""
            return Answered(answer.status, answer.read(), kind.partition(";")[0])
        except TimeoutError:
            raise Broken(f"no answer within {PATIENCE_S:g} s") from None
        except (ConnectionError, http.client.HTTPException):
            return Answered(0)
        finally:
            connection.close()

    def post(self, body: bytes, **headers: str) -> Answered:
        """POST /generate for a PNG; `headers` in place of what belongs there."""
        known = {"Content-Type": "application/json", "Accept": "image/png"}
        return self.send("POST", "/generate", body, {**known, **headers})

    def say(self, words: bytes) -> socket.socket:
        """Open a connection and say words on it."""
        end = socket.create_connection(self.address, timeout=PATIENCE_S)
        end.sendall(words)
        return end

    def statistics(self) -> dict[str, Any]:
        """GET /statistics.

        Raises:
            Broken: it does not answer.
        """
        answer = self.send("GET", "/statistics", None, {})
        if answer.status != 200:
            raise Broken(f"GET /statistics: {answer.status} {answer.detail}")
        found: dict[str, Any] = json.loads(answer.body)
        return found

    def check(self) -> None:
        """See that it is as it was.

        Raises:
            Broken: it ended, draws its picture otherwise, holds what it should not, or has opened
                a file.
        """
        until = time.monotonic() + PATIENCE_S
        while (found := self.statistics())["waiting"] or found["running"]:
            if time.monotonic() > until:
                raise Broken(f"requests are held: {found}")
            time.sleep(0.05)
        own = self.post(json.dumps(OWN).encode())
        if self.process.poll() is not None or own.status == 0:
            raise Broken(f"it ended: {self.said()[-2000:]}")
        if (own.status, own.body) != (200, self.picture):
            raise Broken(f"its own picture is another: {own.status} {own.body[:200]!r}")
        if self.opens.seen():
            raise Broken("a file that a request named was opened")

    def end(self) -> None:
        """End it whatever it does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        atexit.unregister(self.end)
        if self._own.exists():
            self.opens.close()
            shutil.rmtree(self._own)


@functools.cache
def target() -> Target:
    """Return the service that all trials of a run share; see `cache_clear` for a new one."""
    return Target()

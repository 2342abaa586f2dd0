"""Starts worlds of real ranks for the tests, each with a limit, and collects what they report."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed import TCPStore

from support.signals import restore_signals

ROOT = Path(__file__).resolve().parents[2]
OF_RANKS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# What interpreters find imported. xfuser is not among them, nor is what we patch it by.
IMPORTED = (
    "torch._dynamo",
    "diffusers.models.transformers",
    "diffusers.pipelines.flux",
    "diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.wan",
    "diffusers.pipelines.qwenimage",
    "diffusers.pipelines.z_image",
    "diffusers.pipelines.krea2",
)
_SERVER = multiprocessing.get_context("forkserver")
_FORK = multiprocessing.get_context("fork")
_SERVER.set_forkserver_preload(list(IMPORTED))
# Ranks come from a server of their own, which has imported xfuser, too: half a second for each.
_OF_RANKS = forkserver.ForkServer()
_OF_RANKS.set_forkserver_preload([*IMPORTED, "support.warmed"])
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


def launch(
    script: str | Path,
    ranks: int,
    *arguments: str,
    timeout_s: float = 240.0,
    with_xfuser: bool = True,
) -> str:
    """Run a script of tests/ as torchrun does, and return what its ranks printed.

    Ranks are forked from a process that has imported torch, diffusers and, on the CPU platform,
    xfuser, and done nothing else: imports are most of what a small world takes otherwise. That
    scripts import in the right order is for `python` to show. torchrun's own agent waits for ever
    for a forked rank that leaves by `os._exit`.

    Args:
        script: file name in tests/, or a path.
        ranks: number of processes on this machine.
        *arguments: of the script.
        timeout_s: seconds after which the ranks are ended.
        with_xfuser: whether they have xfuser imported.

    Raises:
        WorldFailed: non-zero exit, or time over.
    """
    with tempfile.NamedTemporaryFile("r") as printed:
        world = begin(script, ranks, *arguments, printed=printed.name, with_xfuser=with_xfuser)
        world.join(timeout_s)
        timed_out = world.exitcode is None
        if timed_out:
            # The agent ends its ranks when it is asked to; killed, it would leave them running.
            world.terminate()
            world.join()
        output = printed.read()
    name = f"{script} {' '.join(arguments)} on {ranks} ranks"
    if timed_out:
        raise WorldFailed(f"{name}: ended after {timeout_s} s", output, True)
    if world.exitcode:
        raise WorldFailed(f"{name}: exited with {world.exitcode}", output, False)
    return output


def begin(
    script: str | Path, ranks: int, *arguments: str, printed: str, with_xfuser: bool = True
) -> BaseProcess:
    """Begin what `launch` runs, and return the process that started the ranks.

    Args:
        script: as for `launch`.
        ranks: likewise.
        *arguments: likewise.
        printed: file that what they print is added to.
        with_xfuser: as for `launch`.
    """
    folders = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(filter(None, folders))
    environment = {**os.environ, **OF_RANKS, "PYTHONPATH": path}
    world = _SERVER.Process(
        target=_agent, args=(str(ROOT / "tests" / script), ranks, arguments, environment, printed)
    )
    server = _OF_RANKS if with_xfuser else forkserver._forkserver
    connect = server.connect_to_new_process
    with (
        mock.patch.dict(os.environ, environment),  # The first world starts the server, too.
        mock.patch.object(forkserver, "connect_to_new_process", connect),
    ):
        world.start()
    return world


def run_world(
    script: str | Path, ranks: int, *arguments: str, timeout_s: float = 240.0, **how: bool
) -> dict[int, dict[str, Any]]:
    """Run a script as `launch` does, and return what each rank handed to `report`.

    Raises:
        WorldFailed: also where a rank reported nothing.
    """
    output = launch(script, ranks, *arguments, timeout_s=timeout_s, **how)
    reports = {}
    for line in output.splitlines():
        if line.startswith(_REPORT):
            values = json.loads(line.removeprefix(_REPORT))
            reports[values["rank"]] = values
    if sorted(reports) != list(range(ranks)):
        raise WorldFailed(f"{script}: reports of ranks {sorted(reports)} only", output, False)
    return dict(sorted(reports.items()))


def python(
    *arguments: str | Path, environment: dict[str, str] | None = None, timeout_s: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Run an interpreter of its own, as `subprocess.run([sys.executable, ...])` does in the root.

    It is forked as ranks are, with torch and diffusers imported, and xfuser and the package not.

    Args:
        *arguments: of the interpreter: ``-c code``, ``-m module ...`` or ``script ...``.
        environment: in addition to this process's.
        timeout_s: seconds after which it is ended.

    Raises:
        WorldFailed: time over.
    """
    words = [str(word) for word in arguments]
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = _SERVER.Process(
            target=_interpreter,
            args=(words, {**os.environ, **OF_RANKS, **(environment or {})}, out.name, err.name),
        )
        with mock.patch.dict(os.environ, OF_RANKS):
            process.start()
        process.join(timeout_s)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        printed, errors = out.read(), err.read()
    if code is None:
        raise WorldFailed(f"{words}: ended after {timeout_s} s", printed + errors, True)
    return subprocess.CompletedProcess(words, code, printed, errors)


def report(rank: int, **values: Any) -> None:
    """Print a worker's report, in one write so that ranks do not mix."""
    sys.stdout.write(f"\n{_REPORT}{json.dumps({'rank': rank, **values})}\n")
    sys.stdout.flush()


def _agent(
    script: str, ranks: int, arguments: tuple[str, ...], environment: dict[str, str], printed: str
) -> None:
    """Do what torchrun does on one machine: start ranks, and end all where one fails."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with open(printed, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))
    processes = [
        _FORK.Process(target=_rank, args=(script, arguments, rank, ranks, port))
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        # As with torchrun, the store outlives a rank; begun after the forks, with their threads.
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        running = dict(enumerate(processes))
        while running:
            connection.wait([process.sentinel for process in running.values()])
            ended = {rank: p.exitcode for rank, p in running.items() if p.exitcode is not None}
            if failed := {rank: code for rank, code in ended.items() if code}:
                sys.exit(f"exit codes of ranks: {failed}; the others are ended")
            running = {rank: p for rank, p in running.items() if rank not in ended}
        del store
    finally:
        for process in processes:
            process.terminate()


def _interpreter(words: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """Do what the interpreter does with its arguments."""
    restore_signals()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    folder = str(Path(words[0]).parent) if words[0].endswith(".py") else str(ROOT)
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _rank(script: str, arguments: tuple[str, ...], rank: int, ranks: int, port: int) -> None:
    """Run a script as `python script arguments` does, in torchrun's environment of a rank."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # The agent's came along.
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    sys.argv = [script, *arguments]
    # Set by the test after the server had started.
    sys.path[:0] = [str(Path(script).parent), *os.environ["PYTHONPATH"].split(os.pathsep)]
    runpy.run_path(script, run_name="__main__")

"""Fault worlds: real ranks, one random fault, and a verdict on how all of it ended.

Every world has to end within the limit of its waits and 15 s, with the picture of the run without
a fault or with a named error on every rank that lives. After an error, taking the cache off and
putting it on again on all ranks must draw the right picture.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any
from unittest import mock

from torch.distributed import TCPStore

from xfuser_fastcache.chaos import world_rank
from xfuser_fastcache.chaos.faults import LIMIT_S, REDRAWN, STOPPED_S, World
from xfuser_fastcache.chaos.trials import Verdict
from xfuser_fastcache.xdit.runner_classes import PIPELINES, TRANSFORMERS

# Beyond the limit of its waits, how long a world may take to end.
_SLACK_S = 15.0
# For ranks to start and to draw a picture without a fault, on a machine that is busy.
_START_S = 240.0
# An error names a rank, or the option that a rank's own call contradicts.
_RANKS = re.compile(r"\brank (\d+)|\branks \[([\d, ]+)\]")
_OPTION = re.compile(r"^ValueError: .*steps_mask")
_OF_RANKS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "XFUSER_FASTCACHE_CPU": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# What ranks find imported.
_IMPORTED = (
    "xfuser_fastcache",
    "torch._dynamo",
    "xfuser",
    "xfuser.model_executor.pipelines.register",
    *sorted({module for module, _ in (*TRANSFORMERS.values(), *PIPELINES.values())}),
    "xfuser_fastcache.chaos.world_rank",
    "xfuser_fastcache.chaos.warmed",
)


@dataclass
class _Phase:
    """How one phase ended on each rank.

    Attributes:
        pictures: digest of the picture and of the decisions, by rank.
        errors: by rank.
        died: exit codes of ranks that ended.
        hung: ranks that had not ended when the time was over.
    """

    pictures: dict[int, tuple[str, str]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    died: dict[int, int] = field(default_factory=dict)
    hung: list[int] = field(default_factory=list)

    @property
    def told(self) -> str:
        """All of it, in a line."""
        found = [f"rank {rank}: picture {p[0]}" for rank, p in self.pictures.items()]
        found += [f"rank {rank}: {error[:400]}" for rank, error in self.errors.items()]
        found += [f"rank {rank} ended with {code}" for rank, code in self.died.items()]
        return " | ".join(found + [f"rank {rank} hung" for rank in self.hung])


class _Ranks:
    """The processes of one world."""

    def __init__(self, world: World, cached: bool, log: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        # It outlives every rank, as torchrun's does.
        self._store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        self._wires: dict[int, Any] = {}
        self._processes: dict[int, Any] = {}
        self._dead: dict[int, int] = {}
        server = multiprocessing.get_context("forkserver")
        # A process has one server; it is this one's if worlds are the first to start it.
        server.set_forkserver_preload(list(_IMPORTED))
        with mock.patch.dict(os.environ, _OF_RANKS):  # the first world starts the server, too
            for rank in range(world.ranks):
                own, other = server.Pipe()
                process = server.Process(
                    target=world_rank.main, args=(world, rank, port, cached, other, log)
                )
                process.start()
                other.close()
                self._wires[rank], self._processes[rank] = own, process

    def run(self, phase: str, limit_s: float, slack_s: float = 0.0) -> _Phase:
        """Let all ranks that live run a phase.

        Args:
            phase: a name that `world_rank.main` knows.
            limit_s: longest time until it has ended, or until its fault has happened.
            slack_s: longest time from the fault on.
        """
        found = _Phase(died=dict(self._dead))
        waiting = set(self._wires) - set(self._dead)
        for rank in waiting:
            with suppress(BrokenPipeError):
                self._wires[rank].send(phase)
        deadline = time.monotonic() + limit_s
        wake: dict[int, float] = {}
        while waiting and time.monotonic() < deadline:
            now = time.monotonic()
            for rank in [rank for rank, at in wake.items() if at <= now]:
                del wake[rank]
                os.kill(self._processes[rank].pid, signal.SIGCONT)
            soon = min([deadline, *wake.values()]) - now
            wires = {self._wires[rank]: rank for rank in waiting}
            for ready in connection.wait(list(wires), max(soon, 0.01)):
                rank = wires[ready]
                try:
                    event, value = self._wires[rank].recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join()
                    self._dead[rank] = found.died[rank] = self._processes[rank].exitcode
                    waiting.discard(rank)
                    continue
                if event == "fault":
                    deadline = time.monotonic() + slack_s
                    if value:
                        wake[rank] = time.monotonic() + value
                elif event in ("picture", "error"):
                    waiting.discard(rank)
                    (found.pictures if event == "picture" else found.errors)[rank] = value
        found.hung = sorted(waiting)
        return found

    def end(self) -> None:
        """End every process."""
        for process in self._processes.values():
            process.kill()
            process.join()
        for wire in self._wires.values():
            wire.close()


def trial(seed: int) -> Verdict:
    """Run the world of a seed."""
    return verdict_of(World.of(seed))


def verdict_of(world: World) -> Verdict:
    """Run a world; where it aborts, run it without a cache as well."""
    started = time.monotonic()
    held, ending, detail = _run(world, cached=True)
    if not held and "abort" in ending:
        _, control, told = _run(world, cached=False)
        if "abort" in control:
            held, ending = True, "aborts uncached too"
        detail = f"{detail} || uncached: {control}: {told}"
    return Verdict(
        seed=world.seed,
        kind=str(world),
        held=held,
        ending=ending,
        detail=detail,
        seconds=round(time.monotonic() - started, 1),
    )


def _run(world: World, cached: bool) -> tuple[bool, str, str]:
    """Run a world; return whether it held, how it ended, and a line on that."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        ranks = _Ranks(world, cached, log.name)
        try:
            held, ending, detail = _judged(world, ranks, cached)
        finally:
            ranks.end()
        if not held:
            detail += f" || log: ...{log.read()[-1500:]}"
        return held, ending, detail


def _judged(world: World, ranks: _Ranks, cached: bool) -> tuple[bool, str, str]:
    ranks.run("ready", _START_S)  # else the slowest to build its model is late to the meeting
    right = ranks.run("reference", _START_S)
    if len(right.pictures) < world.ranks:
        return False, "no picture without a fault", right.told
    slack = LIMIT_S + _SLACK_S
    found = ranks.run("fault", slack + STOPPED_S["stopped beyond the limit"], slack)
    killed = {world.rank} if world.fault == "killed" else set()
    if set(found.died) - killed or any(code != -signal.SIGKILL for code in found.died.values()):
        return False, "abort", found.told
    if found.hung:
        return False, "hang", found.told
    unnamed = {rank: e for rank, e in found.errors.items() if not _is_named(e, world, rank)}
    if cached and unnamed:
        return False, "unnamed error", found.told
    wrong = [
        r for r, p in found.pictures.items() if not _is_right(p[0], right.pictures[r][0], world)
    ]
    if wrong and cached:
        return False, "wrong picture", found.told
    if world.fault in REDRAWN and "data" not in world.layout:
        if len({decisions for _, decisions in found.pictures.values()}) > 1:
            return False, "ranks decided differently", found.told
    if killed:
        return (
            True,
            "named error, one rank killed" if found.errors else "others went on",
            found.told,
        )
    again = ranks.run("recovery", slack)
    if again.hung or len(again.died):
        return False, "hang or abort after recovery", f"{found.told} || then {again.told}"
    if again.errors:
        return False, "no recovery", f"{found.told} || then {again.told}"
    if {r: p[0] for r, p in again.pictures.items()} != {r: p[0] for r, p in right.pictures.items()}:
        return False, "wrong picture after recovery", f"{found.told} || then {again.told}"
    return True, "named error, then right picture" if found.errors else "right picture", found.told


def _is_named(error: str, world: World, rank: int) -> bool:
    """Say whether an error names a rank or an option, or is the fault itself; a rank whose cache
    was taken off has none to name anybody."""
    own = rank == world.rank and world.fault == "cache removed"
    found = {int(x) for match in _RANKS.findall(error) for x in ",".join(match).split(",") if x}
    named = bool(found - {rank})
    return own or error.startswith("Injected") or named or bool(_OPTION.search(error))


def _is_right(picture: str, reference: str, world: World) -> bool:
    if world.fault in REDRAWN:
        return picture != "not finite" and bool(picture) == bool(reference)
    return picture == reference

#!/usr/bin/env python3
"""Measure what it costs ranks to agree, and simulate it for worlds that are not at hand.

    python scripts/dev/scale.py --measure 2 4 8 16 32 64 --report runs/scale.json
    python scripts/dev/scale.py --simulate --report runs/scale.json

The first starts processes on this machine that post and await vectors, and nothing else: by the
library's consensus (`direct`: from each rank to each), and with gloo's own all-reduce (`ring`) or
a tree of sends and receives (`tree`) in its place. Ranks that outnumber the cores take turns, so
their times are upper bounds; how often a rank went to sleep, and the time that it kept a core busy,
say more. The second simulates up to
1,024 ranks in pods; see `scripts/dev/_fabric.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table

from scripts.dev._fabric import Link, Steps, World, waits
from scripts.dev._ranks import LIMIT_S, run_ranks
from xfuser_fastcache.cli.flags import flags_of
from xfuser_fastcache.consensus.collective import BlockList, Consensus
from xfuser_fastcache.consensus.header import HEADER, Header
from xfuser_fastcache.consensus.topology import PlainLayout
from xfuser_fastcache.measurements.moments import SLOTS
from xfuser_fastcache.reports.measured import environment

RING, TREE, DIRECT = MODES = ("ring", "tree", "direct")
# Moments of the stack as one span.
GROUPS = 1
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SKIP = 18 / 28

# gloo between two processes of one host: 235.3 us for a ring of two messages (docs/gpu.md); twice
# that for one of a hundred is assumed.
IN_NODE = Link(118.0, 236.0)
# Half of round trips over TCP, after Pingmesh but not checked against its text: 216 us and 1.26 ms
# within a pod, 268 us and 1.34 ms between two.
IN_POD, ACROSS = Link(108.0, 630.0), Link(134.0, 670.0)
# FLUX.1-dev, 28 steps, H100, torch.compile (the page flux.md of xDiT): 4.30 s on one GPU,
# 1.63 s on four. A skipped step: from docs/gpu.md, with `output`.
FLUX = Steps.through(4.30e6 / 28, 1.63e6 / 28, 4, skipped=2200.0)


# ---- processes of this machine ------------------------------------------------------------------


def used() -> tuple[float, int]:
    """Return the time that this process kept a core busy, in us, and how often it went to sleep."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    return (now.ru_utime + now.ru_stime) * 1e6, now.ru_nvcsw


def rounds_of(consensus: Consensus, rounds: int) -> dict[str, float]:
    """Run rounds of the consensus; every rank calls it.

    Returns:
        Of a round: microseconds of its parts (medians), of a busy core, and sleeps (means).
    """
    moments = torch.ones((GROUPS, SLOTS), dtype=torch.int64)
    posts, awaits, words = [], [], []
    busy, sleeps = used()
    for step in range(rounds):
        started = time.perf_counter()
        ticket = consensus.post(Header(0, step, 0, 0), moments)
        posted = time.perf_counter()
        sums = consensus.wait(ticket)
        awaits.append(time.perf_counter() - posted)
        posts.append(posted - started)
        assert sums == [[consensus.group.world_size] * SLOTS]
    now = used()
    for _ in range(rounds):
        started = time.perf_counter()
        consensus.board.arrive("a round")
        words.append(time.perf_counter() - started)
    return {
        "post_us": statistics.median(posts) * 1e6,
        "wait_us": statistics.median(awaits) * 1e6,
        "word_left_us": statistics.median(words) * 1e6,
        "busy_us": (now[0] - busy) / rounds,
        "sleeps": (now[1] - sleeps) / rounds,
    }


class Done:
    """A collective that is over when it is returned; stands in for its `Work`."""

    def wait(self, limit: timedelta) -> None:
        """Nothing to wait for."""


def put_in(consensus: Consensus, mode: str) -> None:
    """Let a consensus reduce by the ring or a tree in place of its own way."""
    group = consensus._wire

    def ring(vector: torch.Tensor, what: str) -> tuple[torch.Tensor, Any]:
        consensus.board.arrive(what)
        return vector[None], group.allreduce([vector])

    def tree(vector: torch.Tensor, what: str) -> tuple[torch.Tensor, Any]:
        consensus.board.arrive(what)
        step, limit = 1, timedelta(seconds=LIMIT_S)
        while step < group.size():
            other, theirs = group.rank() ^ step, torch.empty_like(vector)
            works = group.recv([theirs], other, 0), group.send([vector], other, 0)
            for work in works:
                work.wait(limit)
            vector = vector + theirs
            step *= 2
        return vector[None], Done()

    ways = {RING: ring, TREE: tree, DIRECT: type(consensus)._spread.__get__(consensus)}
    vars(consensus)["_spread"] = ways[mode]


def rank_of(rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Be one rank: run all modes in turn and return the medians over the repeats."""
    consensus = Consensus(
        PlainLayout().decision_group(),
        backend="gloo",
        timeout_s=LIMIT_S,
        config_digest=0,
        block_lists=(BlockList(1, 1),),
    )
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    # The first repeat makes connections, and does not count.
    for repeat, mode in itertools.product(range(repeats + 1), MODES):
        put_in(consensus, mode)
        run = rounds_of(consensus, rounds)
        if repeat:
            found[mode].append(run)
    return {mode: _medians(runs) for mode, runs in found.items()}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def measure(ranks: int, rounds: int, repeats: int) -> dict[str, Any]:
    """Start so many processes, and return what a round costs a rank, the median of all, by mode."""
    found = run_ranks(ranks, rank_of, rounds, repeats)
    return {
        "ranks": ranks,
        "rounds": rounds * repeats,
        "vector_bytes": 8 * (HEADER + GROUPS * SLOTS),
        "load": os.getloadavg()[0],
        "modes": {mode: _medians([one[mode] for one in found]) for mode in MODES},
    }


def messages(ranks: int) -> dict[str, int]:
    """Return how many messages wait for each other in a round, by mode."""
    return {RING: 2 * (ranks - 1), TREE: (ranks - 1).bit_length(), DIRECT: 1}


def show_measured(worlds: list[dict[str, Any]]) -> None:
    """Print a row a world and mode."""
    table = Table(title="A round of the consensus, a rank's median", title_justify="left")
    for name in ("ranks", "mode", "one after the other", "post us", "of it word left us"):
        table.add_column(name, justify="right")
    for name in ("wait us", "core busy us", "sleeps", "load"):
        table.add_column(name, justify="right")
    for world in worlds:
        for mode, found in world["modes"].items():
            parts = [found[key] for key in ("post_us", "word_left_us", "wait_us", "busy_us")]
            table.add_row(
                str(world["ranks"]),
                mode,
                str(messages(world["ranks"])[mode]),
                *(f"{part:,.0f}" for part in parts),
                f"{found['sleeps']:.1f}",
                f"{world['load']:.0f}",
            )
    Console(width=110).print(table)


# ---- a simulated world --------------------------------------------------------------------------


def simulate(steps: Steps, rounds: int, seed: int) -> list[dict[str, float]]:
    """Return, for each number of ranks, what agreeing takes of a computed step, by protocol."""
    found = []
    for ranks in RANKS:
        world = World(ranks, IN_NODE, IN_POD, ACROSS)
        step = steps.computed(ranks)
        few = max(20, min(rounds, rounds * 64 // ranks))
        # A lagged vector has the time of the step between: a skipped one is the shortest.
        times = waits(world, few, seed, steps.skipped)
        found.append({"ranks": ranks, "step_us": step, **times})
    return found


def show_simulated(worlds: list[dict[str, float]], steps: Steps) -> None:
    """Print a row a world: shares of a computed step, and the speedup that is left."""
    for what, of in (("of a computed step", _share), ("speedup with 18 of 28 skipped", _gain)):
        table = Table(title=f"Agreeing on FLUX, {what}", title_justify="left")
        names = [name for name in worlds[0] if name not in ("ranks", "step_us")]
        for name in ("ranks", "step ms", *names):
            table.add_column(name, justify="right")
        for world in worlds:
            row = [of(steps, world, name) for name in names]
            table.add_row(f"{world['ranks']:.0f}", f"{world['step_us'] / 1e3:.1f}", *row)
        Console(width=130).print(table)


def _share(steps: Steps, world: dict[str, float], name: str) -> str:
    return f"{world[name] / world['step_us']:.1%}"


def _gain(steps: Steps, world: dict[str, float], name: str) -> str:
    return f"{steps.gain(int(world['ranks']), SKIP, world[name]):.2f}x"


def main(arguments: list[str]) -> int:
    """Do what the command line asks for; return the exit status."""
    flags = flags_of("scripts/dev/scale.py", __doc__)
    flags.add_argument("--measure", type=int, nargs="+", metavar="RANKS", help="processes to start")
    flags.add_argument("--rounds", type=int, default=50, help="of each mode, three times")
    flags.add_argument("--simulate", action="store_true", help="worlds of 2 to 1,024 ranks")
    flags.add_argument("--seed", type=int, default=0, help="of the simulation")
    flags.add_argument("--report", type=Path, help="JSON to write")
    given = flags.parse_args(arguments)
    _check(given, flags.error)
    report: dict[str, Any] = {"environment": environment("torch")}
    if given.measure:
        rounds = {ranks: max(4, given.rounds * 2 // max(ranks, 2)) for ranks in given.measure}
        report["measured"] = [measure(ranks, rounds[ranks], 3) for ranks in given.measure]
        show_measured(report["measured"])
    if given.simulate:
        report["simulated"] = simulate(FLUX, 400, given.seed)
        show_simulated(report["simulated"], FLUX)
    if given.report:
        given.report.parent.mkdir(parents=True, exist_ok=True)
        given.report.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return 0


def _check(given: argparse.Namespace, error: Callable[[str], Any]) -> None:
    if not given.measure and not given.simulate:
        error("give --measure RANKS..., --simulate, or both")
    if given.measure and min(given.measure) < 2:
        error(f"--measure {min(given.measure)}: give at least 2 ranks")
    if given.rounds < 1:
        error(f"--rounds {given.rounds}: give at least 1")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Break things on purpose, at random, and say what got through.

    fastcache chaos --worlds 20 --seed 7
    fastcache chaos --worlds 400 --resume runs/worlds.jsonl
    fastcache chaos --options 5000 --files 3000 --requests 1000

Every trial is made from its own seed: `--worlds 1 --seed 123` runs world 123 again.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from xfuser_fastcache.chaos.trials import counted, run_trials

# Flag, and module of the room `chaos` with its `trial(seed) -> Verdict` -> what is tried.
KINDS = {
    "worlds": "real ranks, one fault each",
    "options": "configurations that no one should give",
    "files": "calibrations and maps, changed in a few bytes",
    "requests": "requests to the service",
}


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} trials cannot be run; give 1 or more")
    return count


def main(arguments: list[str]) -> int:
    """Run the trials that were asked for.

    Returns:
        0 only where everything held; 2 where nothing was asked for.
    """
    flags = argparse.ArgumentParser(
        prog="fastcache chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for kind, text in KINDS.items():
        flags.add_argument(f"--{kind}", type=_count, metavar="N", help=f"trials: {text}")
    flags.add_argument("--seed", type=int, default=0, help="of the first trial; default 0")
    flags.add_argument("--resume", type=Path, metavar="FILE", help="verdicts to go on from")
    given = flags.parse_args(arguments)
    asked = {kind: getattr(given, kind) for kind in KINDS if getattr(given, kind)}
    if not asked:
        flags.error("give at least one of " + ", ".join(f"--{kind} N" for kind in KINDS))
    if given.resume and len(asked) > 1:
        flags.error("--resume FILE goes with one kind of trial at a time")
    everything_held = True
    for kind, count in asked.items():
        trial = import_module(f"xfuser_fastcache.chaos.{kind}").trial
        verdicts = run_trials(trial, count, given.seed, given.resume)
        everything_held &= all(verdict.held for verdict in verdicts)
        print(counted(verdicts, kind), flush=True)
    return int(not everything_held)

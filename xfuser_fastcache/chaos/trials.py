"""What all kinds of trial share: their seeds, their verdicts and the sum of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Verdict:
    """How one trial ended.

    Attributes:
        seed: of this trial alone; the same seed makes the same trial.
        kind: what was tried, in a word or two, for the counts.
        held: whether what must hold held.
        ending: how it ended, in a word or two, for the counts ("named error", "hang").
        detail: a line on what happened, with the error's text where there is one.
        seconds: that it took.
    """

    seed: int
    kind: str
    held: bool
    ending: str
    detail: str
    seconds: float


def run_trials(
    trial: Callable[[int], Verdict],
    count: int,
    seed: int,
    resume: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Verdict]:
    """Run trials one after another; one that fails is told at once and does not stop the rest.

    Args:
        trial: from its own seed to its verdict.
        count: of trials; their seeds are `seed`, `seed + 1`, ...
        seed: of the first.
        resume: a JSON-lines file of verdicts: those in it are not run again, new ones are added.
        say: takes a line to print.

    Returns:
        The verdicts of these seeds, in order.
    """
    known: dict[int, Verdict] = {}
    if resume and resume.exists():
        lines = resume.read_text(encoding="utf-8").splitlines()
        known = {verdict.seed: verdict for verdict in (Verdict(**json.loads(x)) for x in lines)}
    found = []
    for own in range(seed, seed + count):
        verdict = known.get(own)
        if verdict is None:
            verdict = trial(own)
            if resume:
                with resume.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(verdict)) + "\n")
        if not verdict.held:
            say(f"seed {own}, {verdict.kind}: {verdict.ending}: {verdict.detail}")
        found.append(verdict)
    return found


def counted(verdicts: list[Verdict], what: str) -> str:
    """Return the last line of a run: how many trials, how many held, and how they ended."""
    held = sum(verdict.held for verdict in verdicts)
    endings = Counter(verdict.ending for verdict in verdicts)
    told = ", ".join(f"{ending}: {count}" for ending, count in endings.most_common())
    return f"{what}: {held} of {len(verdicts)} held; {told or 'none were asked for'}"

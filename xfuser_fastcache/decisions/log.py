"""The log of what was decided: its digest rides in every vector, and ranks can compare it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from xfuser_fastcache.clock.schedule import BUDGET, STEPS_MASK
from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.consensus.errors import ConsensusError
from xfuser_fastcache.reports.statistics import BlockInfo

_WORD = 62
# Numbers in the row that ranks compare: 16 KiB.
_ROW = 2048


# Why a span was skipped, or computed, beside a schedule's reasons; all but the first two leave the
# gate unasked.
UNCHANGED, CHANGED = "unchanged", "changed"
OFF, WARM_UP, LAST_STEP = "off", "warm-up", "last step"
NOT_FINITE = "not finite"
TOO_LARGE = "too large to be measured"
SYNCHRONOUS = "synchronous step of the pipeline"
FIRST_BLOCK = "the gate's first block"
NO_ANCHOR, TOO_OLD, NOT_MEASURED = "no anchor", "anchor too old", "not measured"
_OUTCOMES = {CHANGED: "computed", STEPS_MASK: "scheduled", BUDGET: "scheduled"}


class Judgement(NamedTuple):
    """Whether one span is skipped at one step, and why.

    Attributes:
        skip: the flag.
        reason: one of this module's constants.
        statistic: what the gate weighed; None where it was not asked.
        threshold: what the statistic has to stay below; None likewise.
    """

    skip: bool
    reason: str
    statistic: float | None = None
    threshold: float | None = None

    @property
    def outcome(self) -> str:
        """One of "skipped", "computed" (the gate refused), "scheduled" (by a mask or budget) and
        "forced" (nobody was asked).
        """
        if self.skip:
            return "skipped"
        return _OUTCOMES.get(self.reason, "forced")


@dataclass(frozen=True)
class Decision:
    """What was decided at one step of one branch.

    Attributes:
        call: where.
        judgements: one a span.
        wait_s: seconds that this rank waited for the vector that it rests on.
    """

    call: Call
    judgements: list[Judgement]
    wait_s: float

    @property
    def entry(self) -> tuple[int, int, int, int]:
        """Generation, step, branch and flags; bit s of the flags is set where span s is skipped."""
        flags = sum(1 << span for span, judged in enumerate(self.judgements) if judged.skip)
        return self.call.generation, self.call.step, self.call.branch, flags


class DecisionLog:
    """The decisions of the current generation, and a digest of all of them since the beginning.

    Args:
        spans: number of flags in a decision.
    """

    def __init__(self, spans: int):
        self.spans = spans
        self.decisions: list[Decision] = []
        self._hash = hashlib.sha256()
        self._verified = 0
        self._words = -(-spans // _WORD)

    def begin_generation(self) -> None:
        """Forget the decisions of the generation before; the digest goes on."""
        self.decisions.clear()
        self._verified = 0

    def record(self, decision: Decision) -> None:
        """Append a decision."""
        self.decisions.append(decision)
        self._hash.update(repr(decision.entry).encode())

    @property
    def entries(self) -> list[tuple[int, int, int, int]]:
        """The current generation's decisions as ranks compare them; see `Decision.entry`."""
        return [decision.entry for decision in self.decisions]

    def hexdigest(self) -> str:
        """Return the SHA-256 of all decisions."""
        return self._hash.hexdigest()

    def bits(self, count: int) -> int:
        """Return the first `count` bits of the digest."""
        return int.from_bytes(self._hash.digest()[:8], "big") >> (64 - count)

    def unverified(self) -> torch.Tensor | None:
        """Return the decisions since the last call as a row of fixed length; None without any.

        The row holds their number, a digest of all, and as many entries as fit: it can then be
        gathered in one go, which also a pipeline's stages can, without waiting for each other.
        """
        new = self.entries[self._verified :]
        self._verified = len(self.decisions)
        if not new:
            return None
        digest = int.from_bytes(hashlib.sha256(repr(new).encode()).digest()[:7], "big")
        numbers = [len(new), digest]
        for generation, step, branch, flags in new:
            words = [flags >> (_WORD * w) & (1 << _WORD) - 1 for w in range(self._words)]
            numbers += [generation, step, branch, *words]
        row = torch.full((_ROW,), -1, dtype=torch.int64)
        row[: min(_ROW, len(numbers))] = torch.tensor(numbers[:_ROW])
        return row

    def compare(self, rows: dict[int, list[int]]) -> None:
        """Compare the rows of all ranks.

        Raises:
            ConsensusError: naming the first step, branch and span that differ, and the ranks.
        """
        if len({tuple(row) for row in rows.values()}) == 1:
            return
        width = 3 + self._words
        for start in range(2, _ROW - width + 1, width):
            entries = {rank: row[start : start + width] for rank, row in rows.items()}
            if len({tuple(entry[:3]) for entry in entries.values()}) > 1:
                raise ConsensusError(
                    "ranks decided at different places (generation, step, branch): "
                    + ", ".join(f"rank {rank} at {e[:3]}" for rank, e in entries.items())
                )
            generation, step, branch = next(iter(entries.values()))[:3]
            for span in range(self.spans):
                word, bit = 3 + span // _WORD, span % _WORD
                skip = [rank for rank, entry in entries.items() if entry[word] >> bit & 1]
                if 0 < len(skip) < len(entries):
                    raise ConsensusError(
                        f"ranks decided differently at generation {generation}, step {step}, "
                        f"branch {branch}, span {span}: ranks {skip} skip, ranks "
                        f"{sorted(set(entries) - set(skip))} compute"
                    )
        raise ConsensusError(
            f"ranks {sorted(rows)} decided differently, beyond the first "
            f"{(_ROW - 2) // width} decisions"
        )

    def trace(self, blocks: Sequence[BlockInfo]) -> list[dict[str, Any]]:
        """Return the current generation's decisions, one entry a step, branch and span, in order.

        Args:
            blocks: of the whole model, in order.
        """
        ends = {block.span: block.name for block in blocks}
        starts = {block.span: block.name for block in reversed(blocks)}
        return [
            {
                "generation": decision.call.generation,
                "step": decision.call.step,
                "branch": decision.call.branch,
                "noise_level": decision.call.noise_level,
                "span": span,
                "first_block": starts[span],
                "last_block": ends[span],
                "decision": judged.outcome,
                "reason": judged.reason,
                "statistic": judged.statistic,
                "threshold": judged.threshold,
                "consensus_wait_s": decision.wait_s,
            }
            for decision in self.decisions
            for span, judged in enumerate(decision.judgements)
        ]

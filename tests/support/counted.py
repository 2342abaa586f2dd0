"""How many tokens decisions rest on, as the gate is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xfuser_fastcache.gates.base import Evidence, Verdict
from xfuser_fastcache.gates.chi_square import ChiSquareGate


@contextmanager
def counted_tokens() -> Iterator[set[int]]:
    """Collect the token counts of all evidence that the gate of `Fast` judges."""
    seen: set[int] = set()
    judge = ChiSquareGate.judge

    def noting(self: ChiSquareGate, evidence: Evidence, state: Any = None) -> Verdict:
        seen.add(evidence.tokens)
        return judge(self, evidence, state)

    ChiSquareGate.judge = noting  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        ChiSquareGate.judge = judge  # type: ignore[method-assign]

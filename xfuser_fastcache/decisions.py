"""The log of what was decided: its digest rides in every vector, and ranks can compare it."""

from __future__ import annotations

import hashlib

import torch

from xfuser_fastcache.consensus import Consensus, ConsensusError

_WORD = 62


class DecisionLog:
    """The decisions of the current generation, and a digest of all of them since the beginning.

    Args:
        spans: number of flags in a decision.
    """

    def __init__(self, spans: int):
        self.spans = spans
        self.entries: list[tuple[int, int, int, int]] = []
        self._hash = hashlib.sha256()
        self._verified = 0

    def begin_generation(self) -> None:
        """Forget the entries of the generation before; the digest goes on."""
        self.entries.clear()
        self._verified = 0

    def record(self, generation: int, step: int, branch: int, skip: list[bool]) -> None:
        """Append a decision; bit s of the entry is set where span s is skipped."""
        flags = sum(1 << span for span, skipped in enumerate(skip) if skipped)
        self.entries.append((generation, step, branch, flags))
        self._hash.update(repr(self.entries[-1]).encode())

    def hexdigest(self) -> str:
        """Return the SHA-256 of all decisions."""
        return self._hash.hexdigest()

    def bits(self, count: int) -> int:
        """Return the first `count` bits of the digest."""
        return int.from_bytes(self._hash.digest()[:8], "big") >> (64 - count)

    def verify(self, consensus: Consensus) -> None:
        """Compare the decisions since the last call with all other ranks'.

        Raises:
            ConsensusError: naming the first step, branch and span that differ, and the ranks.
        """
        new = self.entries[self._verified :]
        self._verified = len(self.entries)
        digest = hashlib.sha256(repr(new).encode()).digest()
        row = [len(new), *(int.from_bytes(digest[i : i + 7], "big") for i in range(0, 28, 7))]
        rows = consensus.gather(torch.tensor(row), "the comparison of decisions")
        if all(other == row for other in rows.values()):
            return
        # All ranks see the same rows, so all of them come here.
        longest = max(other[0] for other in rows.values())
        width = 3 + -(-self.spans // _WORD)
        table = torch.full((longest, width), -1, dtype=torch.int64)
        for i, (generation, step, branch, flags) in enumerate(new):
            words = [flags >> (_WORD * w) & (1 << _WORD) - 1 for w in range(width - 3)]
            table[i] = torch.tensor([generation, step, branch, *words])
        tables = consensus.gather(table.flatten(), "the search for the first difference")
        raise ConsensusError(self._first_difference(tables, longest, width))

    def _first_difference(self, tables: dict[int, list[int]], longest: int, width: int) -> str:
        for i in range(longest):
            entries = {rank: row[i * width : (i + 1) * width] for rank, row in tables.items()}
            places = {tuple(entry[:3]) for entry in entries.values()}
            if len(places) > 1:
                return f"ranks decided at different places: {entries}"
            ((generation, step, branch),) = places
            for span in range(self.spans):
                word, bit = 3 + span // _WORD, span % _WORD
                skipped = [rank for rank, entry in entries.items() if entry[word] >> bit & 1]
                if 0 < len(skipped) < len(entries):
                    computed = sorted(set(entries) - set(skipped))
                    return (
                        f"ranks decided differently at generation {generation}, step {step}, "
                        f"branch {branch}, span {span}: ranks {skipped} skip, {computed} compute"
                    )
        return "ranks decided differently, but no entry differs"

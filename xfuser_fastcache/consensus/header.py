"""The header of a vector: where a rank is, in numbers whose sums show whether all agree."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

# Each field as value and square: generation, step, branch, digest, setup.
HEADER = 10
DIGEST_BITS = 24


@dataclass(frozen=True)
class Header:
    """Which decision a vector belongs to.

    Attributes:
        generation: counts from 0.
        step: denoising step within the generation, from 0.
        branch: index of the CFG call within the step, from 0.
        digest: `DIGEST_BITS` bits of everything decided so far.
        setup: what the forward pass is given, in words that are equal on all ranks.
    """

    generation: int
    step: int
    branch: int
    digest: int
    setup: str = ""

    def fields(self) -> dict[str, int]:
        """Return the fields by name, the setup as `DIGEST_BITS` bits."""
        return {**vars(self), "setup": _bits_of(self.setup)}

    @property
    def numbers(self) -> list[int]:
        """The fields, each as value and square."""
        return [number for value in self.fields().values() for number in (value, value * value)]

    def differing(self, sums: list[int], world: int) -> list[str]:
        """Return the fields, in words, whose sums over all ranks show that they differ.

        Args:
            sums: of `numbers`, over all ranks.
            world: number of ranks.
        """
        return [
            f"{name} (own {value}, mean of all {sums[2 * i] / world:g})"
            for i, (name, value) in enumerate(self.fields().items())
            if (sums[2 * i], sums[2 * i + 1]) != (world * value, world * value * value)
        ]

    def __str__(self) -> str:
        return f"generation {self.generation}, step {self.step}, branch {self.branch}"


@functools.lru_cache(maxsize=64)
def _bits_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[: DIGEST_BITS // 8], "big")

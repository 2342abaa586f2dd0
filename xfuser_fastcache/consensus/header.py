"""Which decision a vector belongs to: the numbers in front of its moments."""

from __future__ import annotations

from dataclasses import dataclass

# Each field as value and square: generation, step, branch, digest.
HEADER = 8
DIGEST_BITS = 24


@dataclass(frozen=True)
class Header:
    """Which decision a vector belongs to.

    Attributes:
        generation: counts from 0.
        step: denoising step within the generation, from 0.
        branch: index of the CFG call within the step, from 0.
        digest: `DIGEST_BITS` bits of everything decided so far.
    """

    generation: int
    step: int
    branch: int
    digest: int

    def fields(self) -> dict[str, int]:
        """Return the fields by name."""
        return vars(self)

    def numbers(self) -> list[int]:
        """Return what is summed over all ranks, `HEADER` integers."""
        return [number for value in self.fields().values() for number in (value, value * value)]

    def __str__(self) -> str:
        return f"generation {self.generation}, step {self.step}, branch {self.branch}"

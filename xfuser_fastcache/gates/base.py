"""What a gate is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """What all ranks know of one span's input, brought to the step that is decided.

    Attributes:
        change: Q, sum over tokens of squared changes against the anchor, which is the last
            computed step.
        change_squared: sum over tokens of the squared per-token changes.
        reference: R, sum over tokens of the anchor's squared norms.
        tokens: image tokens, over batch and ranks.
        dim: width of a token.
        lag: steps since the anchor.
        noise_levels: of the step that is decided, of the anchor, and of the one before the anchor;
            the latter None where there is none.
    """

    change: float
    change_squared: float
    reference: float
    tokens: int
    dim: int
    lag: int
    noise_levels: tuple[float, float, float | None]


@dataclass(frozen=True)
class Verdict:
    """What a gate says of one span: it may be skipped where the statistic is below the threshold.

    Attributes:
        statistic: what was tested; None where there is nothing to compare with.
        threshold: 0 where nothing may pass.
    """

    statistic: float | None
    threshold: float

    @property
    def may_skip(self) -> bool:
        """Whether the evidence rejects "skipping does harm"."""
        return self.statistic is not None and self.statistic < self.threshold


class Gate(ABC):
    """Says whether a span may be skipped, as a pure function of evidence that all ranks share.

    A gate holds no state and sees no tensor: then ranks that are given the same evidence cannot
    decide differently. Comparisons are strict, so a threshold of 0 never skips.
    """

    @abstractmethod
    def judge(self, evidence: Evidence) -> Verdict:
        """Weigh the evidence of one span."""

"""What a forecaster is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from xfuser_fastcache.block_contract import Streams
from xfuser_fastcache.state import Anchor, Memory


class Forecaster(ABC):
    """Predicts a span's output from its input and from what was computed before.

    Every forecaster is anchored: `output = anchor output + A (input - anchor input) + b`, so that
    with nothing learnt it is `reuse`, the anchor's residual added to the present input.

    Attributes:
        depth: anchors that it looks back on.
    """

    depth: int = 1

    def update(self, memory: Memory, anchor: Anchor) -> Memory:
        """Remember a computed step; returns the new memory and leaves the old one alone."""
        return replace(memory, anchors=(anchor, *memory.anchors)[: self.depth])

    @abstractmethod
    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the predicted output of the span.

        Args:
            memory: holds at least one anchor.
            inputs: what enters the span now; shapes as in the anchors.
            noise_level: sigma of this step.
        """

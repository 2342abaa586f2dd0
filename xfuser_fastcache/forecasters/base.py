"""What a forecaster is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch

from xfuser_fastcache.block_contract import Streams
from xfuser_fastcache.linear_map import SpanMaps, online_slope
from xfuser_fastcache.state import Anchor, Memory


class Forecaster(ABC):
    """Predicts a span's output from its input and from what was computed before.

    Every forecaster is anchored: `output = anchor output + A (input - anchor input) + b`, so that
    with nothing learnt it is `reuse`, the anchor's residual added to the present input.

    Attributes:
        depth: anchors that it looks back on.
        whole_forward: whether it stands in for the transformer's whole forward pass, in place of
            a span of blocks.
    """

    depth: int = 1
    whole_forward: ClassVar[bool] = False

    def kept(self, inputs: Streams, outputs: Streams) -> Streams:
        """Return what an anchor remembers of a computed step: the residual."""
        return outputs.map(torch.sub, inputs)

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


class LinearMapForecaster(Forecaster):
    r"""What forecasters with a linear map share: :math:`\hat r = \bar r + L(x - \bar x)`.

    What a subclass expects of residual and input from the anchors alone, :math:`\bar r` and
    :math:`\bar x`, is its own; `L` is the fitted map, or without one the diagonal slope fitted
    online between the last two computed steps.

    Args:
        maps: fitted on the pairs that `pair` returns for this forecaster, for the span that it
            stands in for; with them nothing is fitted online.
    """

    def __init__(self, maps: SpanMaps | None = None):
        self.maps = maps

    @abstractmethod
    def surprise(
        self, memory: Memory, now: Streams, noise_level: float, of: Callable[[Anchor], Streams]
    ) -> Streams:
        """Return by how much `now` differs from what the same tensors of the anchors let expect.

        Args:
            memory: holds at least one anchor.
            now: input or residual at this step.
            noise_level: sigma of this step.
            of: returns of an anchor what `now` is at this step, `entered` or `gained`.
        """

    def pair(
        self, memory: Memory, inputs: Streams, residual: Streams, noise_level: float
    ) -> tuple[Streams, Streams]:
        """Return what goes into the map and what it had better return, for calibration."""
        return (
            self.surprise(memory, inputs, noise_level, entered),
            self.surprise(memory, residual, noise_level, gained),
        )

    def update(self, memory: Memory, anchor: Anchor) -> Memory:
        """Remember the step and, without fitted maps, fit the slope between it and the last one."""
        updated = super().update(memory, anchor)
        if self.maps is not None or not memory.anchors:
            return updated
        before = memory.anchors[0]
        dx = anchor.inputs.map(torch.sub, before.inputs)
        dr = anchor.residual.map(torch.sub, before.residual)
        return replace(updated, slope=dx.map(online_slope, dr))

    def corrected(
        self, expected: Streams, memory: Memory, inputs: Streams, noise_level: float
    ) -> Streams:
        """Return the `expected` output plus what the map makes of the input's surprise."""
        slope = memory.slope
        if self.maps is None and slope is None:
            return expected
        moved = self.surprise(memory, inputs, noise_level, entered)
        if self.maps is not None:
            gap = abs(noise_level - memory.anchors[0].noise_level)
            return self.maps.corrected(expected, moved, gap)
        assert slope is not None
        return expected.map(torch.addcmul, moved, slope)


def entered(anchor: Anchor) -> Streams:
    """Return what entered the span."""
    return anchor.inputs


def gained(anchor: Anchor) -> Streams:
    """Return what the span added."""
    return anchor.residual


def taylor_weight(memory: Memory, noise_level: float) -> float:
    r"""Return :math:`w = (\sigma - \sigma_0)/(\sigma_0 - \sigma_1)` of the last two anchors.

    0, which forecasts the newest one again, where there is one anchor or both lie at one noise
    level.
    """
    newest = memory.anchors[0]
    if len(memory.anchors) == 1 or newest.noise_level == memory.anchors[1].noise_level:
        return 0.0
    step = newest.noise_level - memory.anchors[1].noise_level
    return (noise_level - newest.noise_level) / step


def extrapolated(memory: Memory, noise_level: float) -> Streams:
    r"""First-order divided difference in the noise level of what the last two anchors hold.

    :math:`\hat r(\sigma) = r_0 + w (r_0 - r_1)` with `w` of `taylor_weight`.
    """
    latest, weight = memory.anchors[0].residual, taylor_weight(memory, noise_level)
    if weight == 0.0:
        return latest
    # lerp rounds once in the working precision where two bf16 products would round twice.
    return memory.anchors[1].residual.map(
        lambda before, after: torch.lerp(before, after, 1.0 + weight), latest
    )

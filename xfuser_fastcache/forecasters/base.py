"""What a forecaster is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from xfuser_fastcache.artifacts.linear_map import SpanMaps, online_slope
from xfuser_fastcache.config.capabilities import Capability
from xfuser_fastcache.config.checks import CheckedOptions
from xfuser_fastcache.models.noise import Mixture
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory


class Forecaster(CheckedOptions, ABC):
    """Predicts a span's output from its input and from what was computed before.

    Every forecaster is anchored: `output = anchor output + A (input - anchor input) + b`, so that
    with nothing learnt it is `reuse`, the anchor's residual added to the present input.

    A subclass is a frozen dataclass of its options (`config.checks.option`), if it has any; it
    holds no state, which is in the memory that it is given.

    Attributes:
        depth: anchors that it looks back on.
        whole_forward: whether it stands in for the transformer's whole forward pass, in place of
            a span of blocks.
        takes_maps: which of the fitted linear maps it takes, by name; None where it takes none.
    """

    depth: int = 1
    whole_forward: ClassVar[bool] = False
    takes_maps: str | None = None

    @property
    def needs(self) -> Collection[Capability]:
        """Capabilities that it needs of the others; see `config.capabilities`."""
        return ()

    @property
    def offers(self) -> Collection[Capability]:
        """Capabilities that the others have by it."""
        return () if self.takes_maps is None else {Capability.MAPS_TAKER}

    @property
    def withholds(self) -> Collection[Capability]:
        """Capabilities that nobody has beside it."""
        withheld = {Capability.FORECASTER_TO_CALIBRATE}
        return withheld | ({Capability.BLOCKS} if self.whole_forward else set())

    def with_maps(self, maps: SpanMaps) -> Forecaster:
        """Return the forecaster with fitted linear maps; only where it `takes_maps`."""
        raise NotImplementedError

    def on_model(self, mixture: Callable[[float], Mixture], sees_latents: bool) -> Forecaster:
        """Return the forecaster for a model and a rank's place.

        Args:
            mixture: of the family and its scheduler, at a noise level.
            sees_latents: whether the rank's forward pass is given the latents and puts out the
                noise prediction; not so in a pipeline's stages.
        """
        return self

    def on_branch(self, guided: int | None) -> Forecaster:
        """Return the forecaster for a call.

        Args:
            guided: 0 where it is guidance's call without the prompt, 1 with it; None where that is
                not known.
        """
        return self

    def multiply_adds_per_token(self, memory: Memory, inputs: Streams, noise_level: float) -> float:
        """Return what a forecast costs that is not negligible, the mean over all tokens.

        Args:
            memory, inputs, noise_level: as given to `forecast`.
        """
        return 0.0

    def nbytes(self) -> int:
        """Bytes that it holds itself, whatever is remembered."""
        return 0

    def kept(self, inputs: Streams, outputs: Streams) -> Streams:
        """Return what an anchor remembers of a computed step: the residual."""
        return outputs.map(torch.sub, inputs)

    def update(self, memory: Memory, anchor: Anchor) -> Memory:
        """Remember a computed step; returns the new memory and leaves the old one alone."""
        return replace(memory, anchors=(anchor, *memory.anchors)[: self.depth])

    def correct_computed(self, memory: Memory) -> Streams | None:
        """Return what a computed span puts out in place of what its blocks did; None for just that.

        Args:
            memory: updated with the step: its newest anchor is what was computed, in the shapes
                that are put out.
        """
        return None

    @abstractmethod
    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the predicted output of the span.

        Args:
            memory: holds at least one anchor.
            inputs: what enters the span now; shapes as in the anchors.
            noise_level: sigma of this step.
        """


@dataclass(frozen=True, eq=False)
class LinearMapForecaster(Forecaster):
    r"""What forecasters with a linear map share: :math:`\hat r = \bar r + L(x - \bar x)`.

    What a subclass expects of residual and input from the anchors alone, :math:`\bar r` and
    :math:`\bar x`, is its own; `L` is the fitted map, or without one the diagonal slope fitted
    online between the last two computed steps.

    Args:
        maps: fitted on the pairs that `pair` returns for this forecaster, for the span that it
            stands in for; with them nothing is fitted online.
    """

    maps: SpanMaps | None = None

    def with_maps(self, maps: SpanMaps) -> LinearMapForecaster:
        """Return the forecaster with these maps in place of the slope fitted online."""
        return replace(self, maps=maps)

    def multiply_adds_per_token(self, memory: Memory, inputs: Streams, noise_level: float) -> float:
        """Return the cost of the fitted map; that of an online slope is negligible."""
        if self.maps is None:
            return 0.0
        gap = abs(noise_level - memory.anchors[0].noise_level)
        return self.maps.multiply_adds_per_token(inputs, gap)

    def nbytes(self) -> int:
        """Bytes of the maps."""
        return 0 if self.maps is None else self.maps.nbytes()

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


class TaylorWeights(NamedTuple):
    r"""The weights :math:`w = (\sigma - \sigma_0)/(\sigma_0 - \sigma_1)` of the last two anchors.

    0, which forecasts the newest one again, where there is one anchor or both lie at one noise
    level.

    Attributes:
        image: of all image tokens, or of each where they were computed at different steps: float32
            `(batch, tokens, 1)`.
        text: of the text tokens.
    """

    image: float | torch.Tensor
    text: float

    @classmethod
    def of(cls, memory: Memory, noise_level: float) -> TaylorWeights:
        """Return the weights for a forecast at a noise level."""
        if len(memory.anchors) == 1:
            return cls(0.0, 0.0)
        newest, before = memory.anchors[:2]
        step = newest.noise_level - before.noise_level
        weight = (noise_level - newest.noise_level) / step if step else 0.0
        if newest.levels is None and before.levels is None:
            return cls(weight, weight)
        levels = [a.noise_level if a.levels is None else a.levels for a in (newest, before)]
        steps = torch.as_tensor(levels[0] - levels[1])
        each = torch.as_tensor(noise_level - levels[0]) / steps
        return cls(each.masked_fill(steps == 0, 0.0), weight)

    @property
    def are_zero(self) -> bool:
        """Whether the newest anchor is forecast again; not asked where tokens differ in weight."""
        return isinstance(self.image, float) and self.image == 0.0

    def times(self, factor: float) -> TaylorWeights:
        """Return weights for so much of the slope."""
        return TaylorWeights(factor * self.image, factor * self.text)

    def damped(self, share: float) -> TaylorWeights:
        r"""Return weights for a slope of which, an anchors' distance on, the `share` is left.

        :math:`\int_0^w \varphi^s\,ds = (1 - \varphi^w)/(-\ln \varphi)`: w for small ones, bounded.

        Args:
            share: :math:`\varphi`, above 0 and below 1.
        """
        fading = -math.log(share)
        return TaylorWeights((1.0 - share**self.image) / fading, (1.0 - share**self.text) / fading)

    def map(
        self,
        function: Callable[[torch.Tensor, torch.Tensor, float | torch.Tensor], torch.Tensor],
        one: Streams,
        other: Streams,
    ) -> Streams:
        """Apply `function` to the tensors of two streams and their weight, stream by stream."""
        image = function(one.hidden_states, other.hidden_states, self.image)

        def of_all(x: torch.Tensor | None, y: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None or y is None else function(x, y, self.text)

        return Streams(
            image,
            of_all(one.encoder_hidden_states, other.encoder_hidden_states),
            of_all(one.rest, other.rest),
            one.ahead,
        )


def extrapolated(memory: Memory, noise_level: float, share: float | None = None) -> Streams:
    r"""First-order divided difference in the noise level of what the last two anchors hold.

    :math:`\hat r(\sigma) = r_0 + w (r_0 - r_1)` with `w` of `TaylorWeights`; damped where a `share`
    is given.
    """
    weights = TaylorWeights.of(memory, noise_level)
    return extrapolated_by(weights if share is None else weights.damped(share), memory)


def extrapolated_by(weights: TaylorWeights, memory: Memory) -> Streams:
    """Return what the newest anchor holds, moved by so much of its change since the one before."""
    latest = memory.anchors[0].residual
    if weights.are_zero:
        return latest
    return weights.map(_extrapolate, latest, memory.anchors[1].residual)


def _extrapolate(
    latest: torch.Tensor, before: torch.Tensor, weight: float | torch.Tensor
) -> torch.Tensor:
    if isinstance(weight, float):
        # lerp rounds once in the working precision where two bf16 products would round twice.
        return torch.lerp(before, latest, 1.0 + weight)
    return (latest + weight * (latest.float() - before.float())).to(latest.dtype)


def told_apart(memory: Memory) -> tuple[Anchor, ...]:
    """Return the newest anchors that can have one weight each, newest first.

    They end before the first noise level that comes again, and before the first anchor whose tokens
    were computed at different steps.
    """
    found: dict[float, Anchor] = {}
    for anchor in memory.anchors:
        if anchor.levels is not None or anchor.noise_level in found:
            break
        found[anchor.noise_level] = anchor
    return tuple(found.values())


def divided_difference(levels: Sequence[float], times: float = 1.0) -> list[float]:
    """Return the weights of a divided difference in Lagrange's form, one an anchor.

    Its order is one less than there are levels, and times its factorial it is a derivative.

    Args:
        levels: noise levels of the anchors, all different.
        times: factor of all weights.

    Example:
        >>> divided_difference([3.0, 2.0, 0.0], times=6.0)  # of squares: 6 times 1
        [2.0, -3.0, 1.0]
    """
    return [
        times / math.prod(level - other for other in levels if other != level) for level in levels
    ]


def weighted(anchors: Sequence[Anchor], weights: Sequence[float]) -> Streams:
    """Return the weighted sum of what anchors hold, rounded to their dtype once."""

    def add(*held: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(held[0].dtype, torch.float32)
        total = weights[0] * held[0].to(wide)
        for weight, x in zip(weights[1:], held[1:], strict=True):
            total = total.add_(x, alpha=weight)
        return total.to(held[0].dtype)

    newest, *others = (anchor.residual for anchor in anchors)
    return newest.map(add, *others)

"""AdaCorrection: a forecast, corrected by what the last one was wrong by."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch

from xfuser_fastcache.artifacts.linear_map import SpanMaps
from xfuser_fastcache.config.capabilities import Capability
from xfuser_fastcache.config.checks import number, option
from xfuser_fastcache.config.methods import method_option
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory

_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class AdaCorrection(Forecaster):
    r"""Adds to another forecaster's output a share of the error that it made where one computed.

    At a computed step the fresh output is at hand, and so is what the forecaster would have said:
    their difference `e` is kept. At a skipped step, token by token,

    .. math:: \hat y = f + w\, e, \quad
        w = \min(1, \gamma \sqrt{S}), \quad
        S = (T + \lambda V) / (\bar T + \lambda \bar V)

    `T` is the mean square over channels of the input's change since the anchor, `V` the variance
    over channels of that change, :math:`\bar T` and :math:`\bar V` the same of the change over
    which `e` came about. So a token that has not moved is left alone, and one that has moved as far
    as it had then is corrected by all of `e`, and never by more. Over `reuse` it is exact where the
    residual is linear in an input that moves on a line, as long as no gap is longer than the one
    before.

    Cost: a forecast more at each computed step, and a norm of each token at each skipped one. One
    more state is remembered, and a second anchor where the forecaster has one.

    Source: AdaCorrection, arXiv 2602.13357: an offset score of temporal change and spatial
    variation blends cached and fresh activations, `(1 - w) cached + w fresh`. Deviations: as
    published both are computed at every step, which cannot be faster than computing; here `fresh -
    cached` is the last one known from a step that was computed anyway. The published score is
    absolute, so that the scale of a model's states decides, and at FLUX's `w` is 1 everywhere; here
    it is relative to the change that `e` belongs to. The published spatial term is the dispersion
    of the state, which calls for correction where nothing has changed; here it is that of the
    change. Weights belong to tokens and not to layers, so that they do not depend on how tokens are
    sharded.
    """

    # A `Forecaster` once it is made.
    of: Any = method_option("forecaster", "reuse", "what is corrected; a forecaster of spans")
    gamma: float = option(
        1.0,
        number(more="; 0 corrects nothing"),
        "sensitivity (ratio)",
        flat="adacorr_gamma",
    )
    lam: float = option(
        1.0, number(), "weight of the spatial variation (ratio)", flat="adacorr_lambda"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "depth", max(2, self.of.depth))
        object.__setattr__(self, "takes_maps", self.of.takes_maps)

    @property
    def needs(self) -> Collection[Capability]:
        """What the last forecast was wrong by has to be known of each token, and be its own."""
        return {Capability.BLOCKS, Capability.ALL_TOKENS, Capability.SOLE_CORRECTION}

    @property
    def withholds(self) -> Collection[Capability]:
        """Another correction would correct what this one has put right."""
        return {Capability.SOLE_CORRECTION, Capability.FORECASTER_TO_CALIBRATE}

    def with_maps(self, maps: SpanMaps) -> AdaCorrection:
        """Return it over the forecaster with these maps."""
        return replace(self, of=self.of.with_maps(maps))

    def multiply_adds_per_token(self, memory: Memory, inputs: Streams, noise_level: float) -> float:
        """Return what the forecast costs that is corrected."""
        return self.of.multiply_adds_per_token(memory, inputs, noise_level)

    def nbytes(self) -> int:
        """Bytes that the forecaster holds."""
        return self.of.nbytes()

    def kept(self, inputs: Streams, outputs: Streams) -> Streams:
        """Return what the forecaster remembers of a computed step."""
        return self.of.kept(inputs, outputs)

    def update(self, memory: Memory, anchor: Anchor) -> Memory:
        """Remember a computed step, and what the forecast would have missed by."""
        updated = self.of.update(memory, anchor)
        anchors = (anchor, *memory.anchors)[: self.depth]
        if not memory.anchors:
            return replace(updated, anchors=anchors)
        said = self.of.forecast(memory, anchor.inputs, anchor.noise_level)
        fresh = anchor.inputs.map(torch.add, anchor.residual)
        return replace(updated, anchors=anchors, missed=fresh.map(torch.sub, said))

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the forecast, corrected where an error is known."""
        said = self.of.forecast(memory, inputs, noise_level)
        if memory.missed is None:
            return said
        last, before = memory.anchors[0].inputs, memory.anchors[1].inputs
        weights = inputs.map(self._weight, last, before)
        return said.map(torch.addcmul, weights, memory.missed)

    def _weight(self, now: torch.Tensor, last: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return the weight of each token, `(batch, tokens, 1)`."""
        score = self._spread(now - last) / self._spread(last - before).clamp_min(_SMALLEST)
        # Infinite for a token that had not moved before; 0 of that would be no number.
        score = score.clamp_max(1 / _SMALLEST)
        return (self.gamma * score.sqrt()).clamp_max(1.0).to(now.dtype)

    def _spread(self, change: torch.Tensor) -> torch.Tensor:
        change = change.float()
        spatial, mean = torch.var_mean(change, dim=-1, keepdim=True, correction=0)
        return spatial + mean.square() + self.lam * spatial

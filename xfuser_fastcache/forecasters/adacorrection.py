"""AdaCorrection: a forecast, corrected by what the last one was wrong by."""

from __future__ import annotations

from dataclasses import replace

import torch

from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory

_SMALLEST = torch.finfo(torch.float32).tiny


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

    Args:
        forecaster: of spans of blocks.
        gamma: sensitivity, a ratio; 0 leaves every forecast alone.
        lam: weight of the spatial term, a ratio.

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

    def __init__(self, forecaster: Forecaster, gamma: float = 1.0, lam: float = 1.0):
        self.forecaster = forecaster
        self.gamma = gamma
        self.lam = lam
        self.depth = max(2, forecaster.depth)

    def kept(self, inputs: Streams, outputs: Streams) -> Streams:
        """Return what the forecaster remembers of a computed step."""
        return self.forecaster.kept(inputs, outputs)

    def update(self, memory: Memory, anchor: Anchor) -> Memory:
        """Remember a computed step, and what the forecast would have missed by."""
        updated = self.forecaster.update(memory, anchor)
        anchors = (anchor, *memory.anchors)[: self.depth]
        if not memory.anchors:
            return replace(updated, anchors=anchors)
        said = self.forecaster.forecast(memory, anchor.inputs, anchor.noise_level)
        fresh = anchor.inputs.map(torch.add, anchor.residual)
        return replace(updated, anchors=anchors, missed=fresh.map(torch.sub, said))

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the forecast, corrected where an error is known."""
        said = self.forecaster.forecast(memory, inputs, noise_level)
        if memory.missed is None:
            return said
        last, before = memory.anchors[0].inputs, memory.anchors[1].inputs
        weights = inputs.map(self._weight, last, before)
        return said.map(torch.addcmul, weights, memory.missed)

    def _weight(self, now: torch.Tensor, last: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return the weight of each token, `(batch, tokens, 1)`."""
        score = self._spread(now - last) / self._spread(last - before).clamp_min(_SMALLEST)
        return (self.gamma * score.sqrt()).clamp_max(1.0).to(now.dtype)

    def _spread(self, change: torch.Tensor) -> torch.Tensor:
        change = change.float()
        spatial, mean = torch.var_mean(change, dim=-1, keepdim=True, correction=0)
        return spatial + mean.square() + self.lam * spatial

"""FastCache's linear map, fitted online in its diagonal form."""

from __future__ import annotations

from dataclasses import replace

import torch

from xfuser_fastcache.block_contract import Streams
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.state import Anchor, Memory

# Pseudo-observations at a slope of zero, as a share of the mean channel energy.
RIDGE = 1.0


class LinearForecaster(Forecaster):
    r"""`output = anchor output + (1 + a) * (input - anchor input)`, one `a` a channel.

    `a` is the ridge regression of the residual's change on the input's change between the last
    two computed steps: :math:`a_d = \sum \Delta x_d \Delta r_d / (\sum \Delta x_d^2 + \rho)`, with
    :math:`\rho` the mean of :math:`\sum \Delta x_d^2` over channels. It shrinks to 0, which is
    `reuse`; until two steps are computed it is `reuse`. Sums run over this rank's tokens and the
    batch, in float32. Cost: a multiply-add a channel, of the order of 1/dim of a block.

    Source: FastCache, arXiv 2505.20353, the block-level linear approximation `W_l h + b_l`.
    Deviation: anchored and fitted, where the published code leaves its projections random.
    """

    def update(self, memory: Memory, anchor: Anchor) -> Memory:
        """Remember the step and fit the slope between it and the one before."""
        updated = super().update(memory, anchor)
        if not memory.anchors:
            return updated
        before = memory.anchors[0]

        def fit(
            x: torch.Tensor, x_before: torch.Tensor, r: torch.Tensor, r_before: torch.Tensor
        ) -> torch.Tensor:
            dx, dr = (x - x_before).float(), (r - r_before).float()
            energy = dx.square().sum(dim=(0, 1))
            slope = (dx * dr).sum(dim=(0, 1)) / (energy + RIDGE * energy.mean() + 1e-30)
            return slope.to(x.dtype)

        slope = anchor.inputs.map(fit, before.inputs, anchor.residual, before.residual)
        return replace(updated, slope=slope)

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the anchored linear prediction."""
        anchor = memory.anchors[0]
        reused = inputs.map(torch.add, anchor.residual)
        if memory.slope is None:
            return reused
        moved = inputs.map(torch.sub, anchor.inputs)
        return reused.map(torch.addcmul, moved, memory.slope)

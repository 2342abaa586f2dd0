"""The residual, extrapolated in the noise level."""

from __future__ import annotations

import torch

from xfuser_fastcache.block_contract import Streams
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.state import Memory


class TaylorForecaster(Forecaster):
    r"""First-order divided difference of the residual over the last two computed steps.

    :math:`\hat r(\sigma) = r_0 + (r_0 - r_1)(\sigma - \sigma_0)/(\sigma_0 - \sigma_1)`; exact
    where the residual is linear in sigma. With one anchor it is `reuse`.

    Source: TaylorSeer, arXiv 2503.06923, order 1. Deviation: differences over the noise level and
    not over the step index, since computed steps are unevenly spaced.
    """

    depth = 2

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the extrapolated residual."""
        newest = memory.anchors[0]
        if len(memory.anchors) == 1 or newest.noise_level == memory.anchors[1].noise_level:
            return inputs.map(torch.add, newest.residual)
        older = memory.anchors[1]
        weight = (noise_level - newest.noise_level) / (newest.noise_level - older.noise_level)

        def extrapolate(
            entering: torch.Tensor, latest: torch.Tensor, before: torch.Tensor
        ) -> torch.Tensor:
            # lerp rounds once in the working precision where two bf16 products would round twice.
            return entering + torch.lerp(before, latest, 1.0 + weight)

        return inputs.map(extrapolate, newest.residual, older.residual)

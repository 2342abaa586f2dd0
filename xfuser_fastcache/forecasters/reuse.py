"""The last residual again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory


@dataclass(frozen=True)
class ReuseForecaster(Forecaster):
    """`output = input + anchor residual`: exact where the residual does not change.

    Source: the rule of TeaCache (arXiv 2411.19108) and First-Block-Cache.
    """

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the last computed residual."""
        return inputs.map(torch.add, memory.anchors[0].residual)

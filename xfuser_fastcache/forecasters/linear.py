"""FastCache's linear map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from xfuser_fastcache.forecasters.base import LinearMapForecaster
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory


@dataclass(frozen=True, eq=False)
class LinearForecaster(LinearMapForecaster):
    r"""The residual of the last computed step, corrected by a linear map of the input's change.

    .. math:: \hat r = r_0 + L(x - x_0)

    `L` comes from calibration, one map a stream and gap in noise level (`SpanMaps`). Without
    calibration it is one slope `a_d` a channel, the ridge regression of the residual's change on
    the input's change between the last two computed steps, without a constant; see `online_slope`.
    Both shrink to 0, which is `reuse`; where nothing is fitted it is `reuse`. Exact where the
    residual is affine in the input, and the map is that one.

    Cost: a multiply-add a channel, of the order of 1/dim of a block; with a fitted map its
    `multiply_adds_per_token`.

    Source: FastCache, arXiv 2505.20353, the block-level linear approximation `W_l h + b_l`.
    Deviation: anchored and fitted, where the published code leaves its projections random; one map
    a skipped span and not one a block.
    """

    takes_maps = "linear"

    def surprise(
        self, memory: Memory, now: Streams, noise_level: float, of: Callable[[Anchor], Streams]
    ) -> Streams:
        """Return the change since the anchor."""
        return now.map(torch.sub, of(memory.anchors[0]))

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the input moved by the corrected residual."""
        reused = inputs.map(torch.add, memory.anchors[0].residual)
        return self.corrected(reused, memory, inputs, noise_level)

"""MeanCache: the average velocity of what lies behind the anchor."""

from __future__ import annotations

from dataclasses import dataclass

from xfuser_fastcache.forecasters.base import Forecaster, TaylorWeights, extrapolated_by
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory


@dataclass(frozen=True)
class MeanCacheForecaster(Forecaster):
    r"""The average of the noise prediction from the newest anchor to here, in place of its value.

    With :math:`v_0` and :math:`v_1` the predictions at the last two computed steps and :math:`u`
    their average over the interval between, :math:`\hat u(\sigma) = v_0 - (\sigma - \sigma_0) J`
    with :math:`J = (v_1 - u)/(\sigma_0 - \sigma_1)`: what the average was off by, kept for the next
    interval. It is exact as an average where the prediction is linear in sigma, and as a prediction
    where it is constant. With one anchor it is the last prediction again.

    It stands in for the whole forward pass, as `output` does.

    Source: MeanCache, arXiv 2601.19961, and its code (github.com/UnicomAI/MeanCache); its search
    for a schedule is not here. Deviation: there :math:`u` is the displacement of the latents over
    the noise level, here the mean of both predictions, :math:`(v_0 + v_1)/2`. Over a gap that was
    skipped the latents were moved by forecasts, and would give these back; after `reuse` they say
    that nothing changes. And with guidance they move by a mixture of branches, of which each is
    forecast by itself.
    """

    depth = 2
    whole_forward = True

    def kept(self, inputs: Streams, outputs: Streams) -> Streams:
        """Return what an anchor remembers: the output itself."""
        return outputs

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the average prediction, which has half of the slope."""
        return extrapolated_by(TaylorWeights.of(memory, noise_level).times(0.5), memory)

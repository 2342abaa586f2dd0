"""The clean latents, extrapolated in the noise level and turned back with the present ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from xfuser_fastcache.config.checks import number, option
from xfuser_fastcache.forecasters.base import Forecaster, TaylorWeights, extrapolated
from xfuser_fastcache.models.forward_layout import laid_out_as, latents_known, noise_part
from xfuser_fastcache.models.noise import Mixture, velocity
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory

# What is left of a slope where nothing draws the latents back: `damped_taylor`'s.
HANDED_ON = 0.6


@dataclass(frozen=True)
class DataForecaster(Forecaster):
    r"""Forecasts the clean latents, and from them and the present latents the noise prediction.

    A prediction and the latents that it was made for tell the clean latents, for flow matching
    :math:`c = x - \sigma v`. Those of the last two computed steps are extrapolated with a slope
    that fades, :math:`\hat c = c_0 + (c_0 - c_1)(1 - \varphi^w)/(-\ln \varphi)`, where :math:`w =
    (\sigma - \sigma_0)/(\sigma_0 - \sigma_1)` and `share` is :math:`\varphi`, and turned back with
    the latents of this step, :math:`\hat v = (x - \hat c)/\sigma`. So what forecasts before have
    led astray is drawn back, as the model itself would do. Exact where the clean latents are
    constant, and so with one anchor.

    It stands in for the whole forward pass: a skipped step runs no layer, and an anchor is as large
    as the latent. Where the latents are not at hand, in the stages of a pipeline, what is handed on
    or put out is extrapolated itself, with the slope of `damped_taylor`.

    Args:
        sees_latents: whether this rank's forward pass is given the latents and puts out the noise
            prediction.
        mixture: of the family and its scheduler, at a noise level.

    Source: ours. The clean latents as the variable are those of DDIM (arXiv 2010.02502) and of
    DPM-Solver++ (arXiv 2211.01095); the fading slope is `damped_taylor`'s.
    """

    depth = 2
    whole_forward = True

    share: float = option(
        0.1,  # By measurement (docs/decisions/data-forecast.md).
        number(0, 1, ends=False),
        "what is left of a slope an anchors' distance ahead (ratio)",
    )
    sees_latents: bool = True
    mixture: Callable[[float], Mixture] = velocity

    def on_model(self, mixture: Callable[[float], Mixture], sees_latents: bool) -> DataForecaster:
        """Return the forecaster for a model and a rank's place."""
        return replace(self, mixture=mixture, sees_latents=sees_latents)

    def kept(self, inputs: Streams, outputs: Streams) -> Streams:
        """Return what an anchor remembers: the output itself."""
        return outputs

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the prediction that belongs to the extrapolated clean latents."""
        plain = extrapolated(memory, noise_level, HANDED_ON)
        now = self.mixture(noise_level)
        known = [now, *(self.mixture(anchor.noise_level) for anchor in memory.anchors)]
        given = [inputs, *(anchor.inputs for anchor in memory.anchors)]
        if not self.sees_latents or not all(latents_known(streams) for streams in given):
            return plain
        if not all(mixture.tells for mixture in known):
            return plain
        clean = self._clean(memory.anchors[0])
        if len(memory.anchors) > 1:
            weight = TaylorWeights.of(memory, noise_level).damped(self.share).image
            clean = clean + weight * (clean - self._clean(memory.anchors[1]))
        image, latents = plain.hidden_states.clone(), inputs.hidden_states
        noise = noise_part(image, latents.shape[-1])
        noise.copy_(now.prediction(laid_out_as(_wide(latents), image), clean))
        return Streams(image, plain.encoder_hidden_states)

    def _clean(self, anchor: Anchor) -> torch.Tensor:
        """Return the clean latents at a computed step, in the output's layout, float32 or wider."""
        image, latents = anchor.residual.hidden_states, anchor.inputs.hidden_states
        noise = _wide(noise_part(image, latents.shape[-1]))
        x = laid_out_as(_wide(latents), image)
        return self.mixture(anchor.noise_level).clean(x, noise)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

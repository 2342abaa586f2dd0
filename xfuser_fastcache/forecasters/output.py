"""The transformer's output, extrapolated in the noise level."""

from __future__ import annotations

from itertools import pairwise

import torch

from xfuser_fastcache.block_contract import Streams
from xfuser_fastcache.fitted import Fitted, Steering
from xfuser_fastcache.forecasters.base import Forecaster, extrapolated
from xfuser_fastcache.state import Anchor, Memory


class OutputForecaster(Forecaster):
    r"""First-order divided difference of the noise prediction over the last two computed steps.

    :math:`\hat f(\sigma) = f_0 + (f_0 - f_1)(\sigma - \sigma_0)/(\sigma_0 - \sigma_1)`; exact where
    the prediction is linear in sigma, the last prediction again with one anchor. It stands in for
    the whole forward pass: a skipped step runs no layer, and an anchor is as large as the latent. A
    pipeline's stage forecasts what it hands on, so shapes on the wire stay as they are. The noise
    level is the adapter's: sigma for FLUX and SD3, for PixArt the angle of its own noise schedule.

    With a calibration a linear correction is added, :math:`w_1 (f_0 - f_1) + w_2 (x - x_0) +
    w_3 f_0 + w_4 x`, x being the latents; its weights belong to the step and to its anchors' lags.
    With a mask that the calibration has searched they belong to the mask and the step, and
    :math:`w_5 (f_1 - f_2)` comes in. The terms with x are absent where the latents are not at hand.
    Such a mask's computed steps are corrected, too: what is computed there, now :math:`f_0`, tells
    what the forecasts before it were wrong by, and thus where they have led the latents astray.

    Args:
        fitted: the calibration; None for the extrapolation alone.
        sees_latents: whether this rank's forward pass is given the latents and puts out the noise
            prediction; False in a pipeline, whose last stage only puts it out.
        steering: corrections for the mask that will run, `Fitted.steering_of`; None for the cells'.

    Source: TaylorSeer, arXiv 2503.06923, order 1, on the output of the model. Deviation:
    differences over the noise level and not over the step index, since computed steps are unevenly
    spaced. The correction is FastCache's learnable linear approximation (arXiv 2505.20353) taken
    to the output, where four numbers a step suffice.
    """

    depth = 2
    whole_forward = True

    def __init__(
        self,
        fitted: Fitted | None = None,
        sees_latents: bool = True,
        steering: Steering | None = None,
    ):
        self.fitted = fitted
        self.sees_latents = sees_latents
        self.steering = steering
        if steering is not None:
            self.depth = 3

    def kept(self, inputs: Streams, outputs: Streams) -> Streams:
        """Return what an anchor remembers: the output itself."""
        return outputs

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the extrapolated output, corrected where a calibration knows how."""
        plain = extrapolated(memory, noise_level)
        weights = self._weights(memory, noise_level)
        if weights is None:
            return plain
        return self.corrected(plain, self.terms(memory, inputs, memory.anchors[0]), weights)

    def put_out(self, memory: Memory) -> Streams | None:
        """Return what was computed, corrected by what it says of the forecasts before it."""
        if self.steering is None or len(memory.anchors) < 2:
            return None
        newest, before = memory.anchors[:2]
        weights = self._steered(memory, newest.noise_level, computed=True)
        if weights is None:
            return None
        return self.corrected(newest.residual, self.terms(memory, newest.inputs, before), weights)

    def terms(self, memory: Memory, inputs: Streams, since: Anchor) -> list[torch.Tensor]:
        """Return what corrections are made of, each in the output's layout, in float32.

        In the order of the weights; changes that look back further than the anchors are 0.

        Args:
            memory: holds at least one anchor.
            inputs: what enters the forward pass now.
            since: the computed step from which the latents' change is taken.
        """
        image = memory.anchors[0].residual.hidden_states
        # A model that predicts its variance too puts out more channels than it is given.
        channels = inputs.hidden_states.shape[-1] if self.sees_latents else None
        outputs = [_noise(a.residual.hidden_states, channels).float() for a in memory.anchors]
        last = outputs[0]
        changes = [after - before for after, before in pairwise(outputs)]
        changes += [torch.zeros_like(last)] * (self.depth - 1 - len(changes))
        if not self.sees_latents:
            return [changes[0], last, *changes[1:]]
        given = inputs, since.inputs
        x, x0 = (_as(streams.hidden_states, image).float() for streams in given)
        return [changes[0], x - x0, last, x, *changes[1:]]

    def corrected(self, plain: Streams, terms: list[torch.Tensor], weights: list[float]) -> Streams:
        """Return a forecast with the weighted terms added to its noise prediction."""
        image = plain.hidden_states.clone()
        noise = _noise(image, terms[0].shape[2] if image.dim() == 4 else None)
        noise += sum(weight * term for weight, term in zip(weights, terms, strict=True))
        return Streams(image, plain.encoder_hidden_states)

    def _weights(self, memory: Memory, noise_level: float) -> list[float] | None:
        """Return the weights of a forecast's corrections; None where there are none."""
        if self.fitted is None:
            return None
        if self.steering is not None:
            return self._steered(memory, noise_level, computed=False)
        levels = [anchor.noise_level for anchor in memory.anchors]
        cell = self.fitted.cell(noise_level, levels[0], levels[1] if levels[1:] else None)
        if cell is None:
            return None
        table = self.fitted.weights if self.sees_latents else self.fitted.weights_blind
        weights = table[cell].tolist()
        return weights if any(weights) else None

    def _steered(self, memory: Memory, noise_level: float, computed: bool) -> list[float] | None:
        """Return the weights of a mask's corrections; None at a step that is not of the plan."""
        assert self.fitted is not None and self.steering is not None
        levels = [noise_level, *(anchor.noise_level for anchor in memory.anchors)]
        known = [step for level in levels if (step := self.fitted.step_at(level)) is not None]
        if len(known) < len(levels):
            return None
        weights = self.steering.at(known[0], known[1:], computed)
        return weights.tolist() if weights.any() else None


def _noise(output: torch.Tensor, channels: int | None) -> torch.Tensor:
    """Return the channels of an output that hold the noise prediction: the first ones.

    Args:
        output: `(batch, tokens, channels)`, or a picture with its rows in dimension 1.
        channels: of the latents; None for all.
    """
    return output[:, :, :channels] if output.dim() == 4 and channels is not None else output


def _as(latents: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return latents `(batch, tokens, channels)` in the layout of an output."""
    if output.dim() == 3:
        return latents
    batch, _, channels = latents.shape
    return latents.reshape(batch, output.shape[1], -1, channels).transpose(2, 3)

"""The transformer's output, extrapolated in the noise level."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from xfuser_fastcache.artifacts.calibration import Fitted, TrajectoryCorrection
from xfuser_fastcache.config.capabilities import Capability
from xfuser_fastcache.forecasters.base import Forecaster, extrapolated
from xfuser_fastcache.models.forward_layout import laid_out_as, latents_known, noise_part
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory

# One a term; for all pictures of a batch, or one each, `(batch,)`.
Weights = Sequence[float | torch.Tensor]


@dataclass(frozen=True, eq=False)
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
    :math:`w_5 (f_1 - f_2)` comes in. A pipeline's stages but the last correct nothing, and nor does
    that one where its latents are not known.
    With classifier-free guidance the pictures without it and those with it have weights of their
    own, if the calibration has them: which is which is told by `branch`, where each is a call by
    the call's name (`on_branch`), or else by a batch whose halves hold the same latents, without
    guidance first, as diffusers' pipelines make it.
    Such a mask's computed steps are corrected, too: what is computed there, now :math:`f_0`, tells
    what the forecasts before it were wrong by, and thus where they have led the latents astray.

    Args:
        fitted: the calibration; None for the extrapolation alone.
        correction: corrections for the mask that will run, of `Fitted.trajectory_correction`; None
            for the cells'.
        branch: of guidance, where the ranks share it out: 0 without it, 1 with it; None where a
            batch holds all there is.

    Source: TaylorSeer, arXiv 2503.06923, order 1, on the output of the model. Deviation:
    differences over the noise level and not over the step index, since computed steps are unevenly
    spaced. The correction is FastCache's learnable linear approximation (arXiv 2505.20353) taken
    to the output, where four numbers a step suffice.
    """

    depth = 2
    whole_forward = True

    fitted: Fitted | None = None
    correction: TrajectoryCorrection | None = None
    branch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction is not None:
            object.__setattr__(self, "depth", 3)

    @property
    def withholds(self) -> Collection[Capability]:
        """A calibration corrects this very forecast; single blocks are left alone."""
        return {Capability.BLOCKS}

    def on_branch(self, guided: int | None) -> OutputForecaster:
        """Return the forecaster with the weights of the call's own branch."""
        own = self.correction is not None and self.correction.guided is not None
        if guided is None or self.branch is not None or not own:
            return self
        return replace(self, branch=guided)

    def kept(self, inputs: Streams, outputs: Streams) -> Streams:
        """Return what an anchor remembers: the output itself."""
        return outputs

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return the extrapolated output, corrected where a calibration knows how."""
        plain = extrapolated(memory, noise_level)
        found = self._correct(plain, memory, inputs, noise_level, computed=False)
        return plain if found is None else found

    def correct_computed(self, memory: Memory) -> Streams | None:
        """Return what was computed, corrected by what it says of the forecasts before it."""
        if len(memory.anchors) < 2:
            return None
        newest = memory.anchors[0]
        now = newest.inputs, newest.noise_level
        return self._correct(newest.residual, memory, *now, computed=True)

    def terms(self, memory: Memory, inputs: Streams, computed: bool) -> list[torch.Tensor]:
        """Return what corrections are made of, each in the output's layout, in float32.

        In the order of the weights; changes that look back further than the anchors are 0.

        Args:
            memory: holds at least one anchor.
            inputs: what enters the forward pass now.
            computed: whether the newest anchor is this very step; the latents' change is then taken
                from the one before it.
        """
        image = memory.anchors[0].residual.hidden_states
        # A model that predicts its variance too puts out more channels than it is given.
        channels = inputs.hidden_states.shape[-1]
        outputs = [noise_part(a.residual.hidden_states, channels).float() for a in memory.anchors]
        last = outputs[0]
        changes = [after - before for after, before in pairwise(outputs)]
        changes += [torch.zeros_like(last)] * (self.depth - 1 - len(changes))
        given = inputs, memory.anchors[int(computed)].inputs
        x, x0 = (laid_out_as(streams.hidden_states, image).float() for streams in given)
        return [changes[0], x - x0, last, x, *changes[1:]]

    def corrected(self, plain: Streams, terms: list[torch.Tensor], weights: Weights) -> Streams:
        """Return a forecast with the weighted terms added to its noise prediction."""
        image = plain.hidden_states.clone()
        noise = noise_part(image, terms[0].shape[2])
        noise += sum(each(weight, term) * term for weight, term in zip(weights, terms, strict=True))
        return Streams(image, plain.encoder_hidden_states)

    def _correct(
        self, plain: Streams, memory: Memory, inputs: Streams, noise_level: float, computed: bool
    ) -> Streams | None:
        """Return a forecast, or what was computed, with its corrections; None without any, or
        where the latents are not known that they are made of."""
        given = [inputs, *(anchor.inputs for anchor in memory.anchors)]
        if not all(latents_known(streams) for streams in given):
            return None
        if self.correction is not None:
            weights = self._steered(memory, inputs, noise_level, computed)
        else:
            weights = None if computed else self._of_cell(memory, noise_level)
        if weights is None:
            return None
        return self.corrected(plain, self.terms(memory, inputs, computed), weights)

    def _of_cell(self, memory: Memory, noise_level: float) -> Weights | None:
        """Return the weights of a forecast's cell; None where there are none."""
        if self.fitted is None:
            return None
        levels = [anchor.noise_level for anchor in memory.anchors]
        cell = self.fitted.cell(noise_level, levels[0], levels[1] if levels[1:] else None)
        if cell is None:
            return None
        weights = self.fitted.weights[cell].tolist()
        return weights if any(weights) else None

    def _steered(
        self, memory: Memory, inputs: Streams, noise_level: float, computed: bool
    ) -> Weights | None:
        """Return the weights of a mask's corrections; None at a step that is not of the plan."""
        assert self.fitted is not None and self.correction is not None
        levels = [noise_level, *(anchor.noise_level for anchor in memory.anchors)]
        known = [step for level in levels if (step := self.fitted.step_at(level)) is not None]
        if len(known) < len(levels):
            return None
        row = self.correction.row(known[0], known[1:], computed)
        if row is None:
            return None
        common = self.correction.weights[row].tolist()
        if self.correction.guided is None:
            return common
        without, with_it = self.correction.guided[row].tolist()
        if self.branch is not None:
            return (without, with_it)[self.branch]
        paired = halves_agree(inputs.hidden_states)
        if paired is None:
            return common
        own = zip(common, without, with_it, strict=True)
        return [torch.cat([torch.where(paired, w, one) for w in (a, b)]) for one, a, b in own]


def halves_agree(latents: torch.Tensor) -> torch.Tensor | None:
    """Return which pictures of a batch's first half are those of the second, `(batch / 2,)`, bool.

    Guidance makes such a batch. Decided on the device; None for an odd batch.
    """
    if len(latents) % 2:
        return None
    first, second = latents.chunk(2)
    return (first == second).flatten(1).all(dim=1)


def each(weight: float | torch.Tensor, term: torch.Tensor) -> float | torch.Tensor:
    """Return a weight, or one a picture, as it multiplies a term."""
    return weight if isinstance(weight, float) else weight.view(-1, *[1] * (term.dim() - 1))

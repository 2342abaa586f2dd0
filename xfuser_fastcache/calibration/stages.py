"""Masks and their corrections in PipeFusion itself, with its patches and its older keys.

Its last stage alone puts out the noise and holds the scheduler, so that it fits: blind corrections,
which it will apply, patch by patch as they come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xfuser_fastcache.apply import adapter_of, model_of
from xfuser_fastcache.calibration.masks import MaskTrials
from xfuser_fastcache.calibration.steering import (
    FullRun,
    Observer,
    SteeringForecaster,
    updates_of,
)
from xfuser_fastcache.calibration.team import Team
from xfuser_fastcache.models.forward_layout import ForwardContract, noise_tokens
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory


class StageObserver(Observer):
    """Keeps what the last stage of a pipeline puts out, and what its scheduler makes of it.

    Args:
        pipe: in xfuser's class, on a rank of the last stage.
        generations: pictures of the batch.
        team: knows the patch at work.

    Attributes:
        latents: as of `Observer`; also after the last step that is complete.
    """

    def __init__(self, pipe: Any, generations: int, team: Team):
        adapter = adapter_of(model_of(pipe.transformer))
        super().__init__((pipe.transformer,), adapter, generations, 0, team)
        self.scheduler = pipe.scheduler
        # Of the patches of this step so far: latents before and after it, and the output.
        self._patches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._output = torch.empty(0)

    def __enter__(self) -> StageObserver:
        super().__enter__()
        step: Callable[..., Any] = self.scheduler.step

        def observed(model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            found = step(model_output, timestep, sample, **options)
            after = found[0] if isinstance(found, tuple) else found.prev_sample
            self._step(sample, after)
            return found

        vars(self.scheduler)["step"] = observed
        return self

    def __exit__(self, *_: Any) -> None:
        super().__exit__()
        del vars(self.scheduler)["step"]

    def rows(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return `(k n, tokens, channels)` each as `(k, n, tokens, channels)`."""
        return [one.unflatten(0, (-1, self.generations)).float() for one in tensors]

    def tokens_of_patch(self, count: int) -> slice:
        """Return which tokens of the picture the patch at work has, given how many."""
        start = sum(output.shape[2] for *_, output in self._patches)
        return slice(start, start + count)

    def _open(self, module: Any, args: Any, kwargs: Any) -> None:
        """Steps are counted by those that are complete: all guidance of one comes in one call."""

    def _observe(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self._output = ForwardContract().unpack(output).hidden_states

    def _step(self, before: torch.Tensor, after: torch.Tensor) -> None:
        tokens = [ForwardContract().read((one,), {}).hidden_states for one in (before, after)]
        made = self.rows(noise_tokens(self._output, tokens[0]))[0].clone()
        self._patches.append((tokens[0].float().clone(), tokens[1].float().clone(), made))
        patch, patches = self.team.patch()
        if patch < patches - 1:
            return
        first, then, outputs = zip(*self._patches, strict=True)
        self._patches = []
        if not self.latents:
            self.latents.append(torch.cat(first, dim=1))
        self.latents.append(torch.cat(then, dim=1))
        self.outputs.append(torch.cat(outputs, dim=2))


class StageForecaster(SteeringForecaster):
    """Fits blind corrections on the last stage; a patch by itself and those of its step before it.

    Args:
        full: the same batch with full computation in this layout.
        observer: of this run.
    """

    observer: StageObserver

    def __init__(self, full: FullRun, observer: StageObserver):
        super().__init__(full, observer, sees_latents=False)

    def _correct(
        self, plain: Streams, memory: Memory, inputs: Streams, noise_level: float, computed: bool
    ) -> Streams:
        terms = self.terms(memory, inputs, computed)
        seen = self.observer
        step, latents = len(seen.outputs), seen.latents[len(seen.outputs)]
        made = [noise_tokens(x, latents) for x in (plain.hidden_states, *terms)]
        at = seen.tokens_of_patch(made[0].shape[1])
        base, *columns = seen.rows(*made)
        self.found[step] = self._fit(step, latents[:, at], base, columns, at)
        return self.corrected(plain, terms, self.found[step].tolist())


class StagedTrials(MaskTrials):
    """Finds masks and corrections where a pipeline's stages share the blocks.

    The file has no corrections that see the latents: no rank could fit any.
    """

    @property
    def _last(self) -> bool:
        place = self.runs.team.place
        return place.stage == place.stages - 1

    def steered(self, mask: list[int]) -> float:
        """Fit corrections for a mask; return what it makes of the generations held out, in dB."""
        runs, forecaster = self.runs, None
        if self._last:
            assert self.full is not None
            with StageObserver(runs.pipe, len(self.batch), runs.team) as observer:
                forecaster = StageForecaster(self.full, observer)
                drawn = runs.latents(*self.batch, forecaster=forecaster, steps_mask=mask)
        else:
            drawn = runs.latents(*self.batch, steps_mask=mask)
        fitted = runs.team.of_replica(None if forecaster is None else forecaster.found)
        self._steered[tuple(mask)] = next(one for _, one in fitted if one is not None)
        return self._judged(drawn)

    def _corrections(self, masks: list[list[int]]) -> dict[str, list[NDArray[np.float32]]]:
        return {"steering_blind": [self._steered[tuple(mask)] for mask in masks]}

    def _full_run(self) -> tuple[FullRun | None, torch.Tensor]:
        runs = self.runs
        if not self._last:
            return None, runs.latents(*self.batch)
        with StageObserver(runs.pipe, len(self.batch), runs.team) as observer:
            final = runs.latents(*self.batch)
        updates = updates_of(observer.latents, observer.outputs)
        return FullRun(observer.latents, observer.outputs, updates, self.fits), final

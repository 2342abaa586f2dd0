"""Masks and their corrections in PipeFusion itself, with its patches and its older keys.

Its last stage alone puts out the noise and holds the scheduler, so that it fits the corrections,
which it will apply, patch by patch as they come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xfuser_fastcache.calibration.masks import MaskTrials
from xfuser_fastcache.calibration.steering import (
    FullRun,
    Observer,
    SteeringForecaster,
    updates_of,
)
from xfuser_fastcache.calibration.team import Team
from xfuser_fastcache.models.forward_layout import ForwardContract, noise_tokens


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
        super().__init__(pipe.transformer, generations, 0, team)
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

    def tokens_at_work(self, count: int) -> slice:
        """Return which tokens of the picture the patch at work has, given how many."""
        start = sum(output.shape[2] for *_, output in self._patches)
        return slice(start, start + count)

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
    """Fits corrections on the last stage alone; a patch by itself and those of its step before."""

    def _agreed(self, fit: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        return fit()


class StagedTrials(MaskTrials):
    """Finds masks and corrections where a pipeline's stages share the blocks."""

    def _told(self, known: Any) -> Any:
        """Return what the last stage knows, on all of them."""
        told = self.runs.team.of_replica(known if self._last else None)
        return next(one for _, one in told if one is not None)

    @property
    def _last(self) -> bool:
        place = self.runs.team.place
        return place.stage == place.stages - 1

    def _run(self, mask: list[int], by_branch: bool = False) -> tuple[float, NDArray[np.float32]]:
        runs, forecaster = self.runs, None
        if self._last:
            assert self.full is not None
            with StageObserver(runs.pipe, len(self.batch), runs.team) as observer:
                forecaster = StageForecaster(self.full, observer, by_branch)
                drawn = runs.latents(*self.batch, forecaster=forecaster, steps_mask=mask)
        else:
            drawn = runs.latents(*self.batch, steps_mask=mask)
        return self._judged(drawn), self._told(None if forecaster is None else forecaster.found)

    def _full_run(self) -> tuple[FullRun | None, torch.Tensor]:
        runs = self.runs
        if not self._last:
            return None, runs.latents(*self.batch)
        with StageObserver(runs.pipe, len(self.batch), runs.team) as observer:
            final = runs.latents(*self.batch)
        updates = updates_of(observer.latents, observer.outputs)
        return FullRun(observer.latents, observer.outputs, updates, self.fits), final

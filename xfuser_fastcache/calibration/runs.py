"""Generations that calibrations are made from: run plain or cached, and recorded."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from xfuser_fastcache.apply import (
    adapter_of,
    apply_cache_on_pipeline,
    denoisers_of,
    model_of,
    remove_cache_from_pipeline,
    replace_forecaster,
)
from xfuser_fastcache.artifacts.calibration import OTHERS, Fitted, fingerprint
from xfuser_fastcache.artifacts.file import replace_file
from xfuser_fastcache.calibration.options import RunOptions
from xfuser_fastcache.calibration.record import Recorder, Trajectory
from xfuser_fastcache.calibration.team import Alone, Ranks, Team
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.reports.clips import content_of
from xfuser_fastcache.xdit.loaded import call_arguments, known_arguments, load_pipeline


class Runs:
    """Runs one pipeline, and keeps what it recorded.

    In a layout, its methods are collective calls.

    Args:
        options: how to run it.
        prompts: of the generations.
        pipe: in xfuser's class, where ranks draw together; None loads diffusers' own.
    """

    def __init__(self, options: RunOptions, prompts: list[str], pipe: Any = None):
        self.team: Team = Alone() if pipe is None else Ranks(pipe.transformer)
        self.pipe = load_pipeline(options.model, options.dtype) if pipe is None else pipe
        self.options, self.prompts = options, prompts
        # Where records are kept until the run is done; None keeps none.
        self.folder: Path | None = None
        call = call_arguments(options.model) if options.call is None else options.call
        self.call = known_arguments(getattr(self.pipe, "module", self.pipe), call)
        self.pipe.set_progress_bar_config(disable=True)
        self.denoisers = denoisers_of(self.pipe)
        self.model = model_of(self.pipe.transformer)
        self.adapter = adapter_of(self.model)

    def latents(
        self, *indices: int, forecaster: OutputForecaster | None = None, **cache: Any
    ) -> torch.Tensor:
        """Return the final latents of a batch; cached where options of a cache are given.

        Args:
            *indices: of the generations in the batch.
            forecaster: takes the place of the cache's own.
            **cache: options.
        """
        if cache:
            config = CacheConfig(forecaster="output", **cache)
            apply_cache_on_pipeline(self.pipe, config=config)
        if forecaster is not None:
            for denoiser in self.denoisers.values():
                replace_forecaster(denoiser, forecaster)
        shared = len(indices) > 1
        own: Sequence[int] = indices
        if shared:
            share = self.team.shares(len(indices))[self.team.place.replica]
            own = [indices[place] for place in share]
        # xfuser's class takes this replica's prompts of a batch by itself.
        prompts = indices if hasattr(self.pipe, "module") else own
        first = 1000 * self.options.seed
        try:
            output = self.pipe(
                prompt=[self.prompts[index] for index in prompts],
                num_inference_steps=self.options.num_inference_steps,
                generator=[torch.Generator("cpu").manual_seed(first + index) for index in own],
                output_type="latent",
                **self.call,
            )
        finally:
            if cache:
                remove_cache_from_pipeline(self.pipe)
        return self.team.drawn(None if output is None else content_of(output), shared)

    def records(
        self, indices: Sequence[int], name: str, **cache: Any
    ) -> Iterator[list[Trajectory]]:
        """Yield the records of generations, those of the folder where they are there already.

        Args:
            indices: of the generations, in the order in which they are yielded.
            name: of their kind.
            **cache: options; without any they compute everything.
        """
        missing = self.team.agreed(lambda: [i for i in indices if not self._kept(name, i)])
        fresh = self.team.shared_out(missing, lambda index: self._record(index, **cache))
        for index in indices:
            path = self._path(name, index)
            if index in missing:
                found = next(fresh)
                if path is not None and self.team.first:
                    _write(path, found)
            else:
                assert path is not None
                found = self.team.agreed(functools.partial(_read, path))
            yield found

    def _path(self, name: str, index: int) -> Path | None:
        return self.folder / f"{name}-{index:05d}.npz" if self.folder else None

    def _kept(self, name: str, index: int) -> bool:
        path = self._path(name, index)
        return path is not None and path.exists()

    def _record(self, index: int, **cache: Any) -> list[Trajectory]:
        tokens = self.options.max_tokens
        denoisers = tuple(self.denoisers.values())
        with Recorder(denoisers, self.adapter, tokens, self.team) as recorder:
            self.latents(index, **cache)
        return recorder.take()

    def levels(self) -> np.ndarray:
        """Return the noise levels of the plan that the last generation ran by."""
        return np.array([step.noise_level for step in self.adapter.plan(self.pipe.scheduler)])

    def metadata(self) -> dict[str, Any]:
        """Return what the file says of its origin."""
        scheduler = getattr(self.pipe.scheduler, "module", self.pipe.scheduler)
        held = sum(len(getattr(self.model, name)) for name in self.adapter.block_lists)
        by_stage = {place.stage: blocks for place, blocks in self.team.of_replica(held)}
        blocks = sum(by_stage.values())
        first, *others = (
            fingerprint(model_of(one), self.adapter.model_class, self.adapter.embedder, blocks)
            for one in self.denoisers.values()
        )
        return {
            **first,
            **({OTHERS: others} if others else {}),
            "scheduler": type(scheduler).__name__,
            "num_inference_steps": self.options.num_inference_steps,
            "seed": self.options.seed,
            "generations": len(self.prompts),
            "call": self.call,
            "layout": self.team.layout,
            "versions": {name: version(name) for name in ("torch", "diffusers")},
        }


def _write(path: Path, found: list[Trajectory]) -> None:
    arrays = {
        f"{branch}_{name}": value
        for branch, trajectory in enumerate(found)
        for name, value in vars(trajectory).items()
    }
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    replace_file(path, packed.getvalue())


def _read(path: Path) -> list[Trajectory]:
    with np.load(path) as held:
        count = 1 + max(int(name.split("_")[0]) for name in held.files)
        names = [field.name for field in fields(Trajectory)]
        return [Trajectory(*(held[f"{b}_{name}"] for name in names)) for b in range(count)]


@contextmanager
def saved(fitted: Fitted) -> Iterator[str]:
    """Lend a calibration that is not finished a file; each rank has its own."""
    # Where no scale is known yet, the gate never skips.
    scales = fitted.scales or {CacheConfig().resolved().significance_level: 0.0}
    with TemporaryDirectory() as folder:
        path = Path(folder, "unfinished.safetensors")
        replace(fitted, scales=scales).save(path)
        yield str(path)

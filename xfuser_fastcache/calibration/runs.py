"""Generations that calibrations are made from: run plain or cached, and recorded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xfuser_fastcache.apply import (
    adapter_of,
    apply_cache_on_transformer,
    remove_cache,
    replace_forecaster,
)
from xfuser_fastcache.artifacts.calibration import Fitted, fingerprint
from xfuser_fastcache.artifacts.file import replace_file
from xfuser_fastcache.calibration.options import RunOptions
from xfuser_fastcache.calibration.record import Recorder, Trajectory
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.reports.clips import content_of
from xfuser_fastcache.xdit.loaded import call_arguments, known_arguments, load_pipeline


class Runs:
    """Runs one pipeline, and keeps what it recorded.

    Args:
        options: how to run it.
        prompts: of the generations.
        folder: where records are kept until the run is done; None keeps none.
    """

    def __init__(self, options: RunOptions, prompts: list[str], folder: Path | None = None):
        self.pipe = load_pipeline(options.model, options.dtype)
        self.options, self.prompts, self.folder = options, prompts, folder
        call = call_arguments(options.model) if options.call is None else options.call
        self.call = known_arguments(self.pipe, call)
        self.adapter = adapter_of(self.pipe.transformer)

    def latents(
        self, *indices: int, forecaster: OutputForecaster | None = None, **cache: Any
    ) -> torch.Tensor:
        """Return the final latents of a batch; cached where options of a cache are given.

        Args:
            *indices: of the generations in the batch.
            forecaster: takes the place of the cache's own.
            **cache: options.
        """
        transformer = self.pipe.transformer
        if cache:
            config = CacheConfig(forecaster="output", **cache)
            apply_cache_on_transformer(transformer, config=config, scheduler=self.pipe.scheduler)
        if forecaster is not None:
            replace_forecaster(transformer, forecaster)
        first = 1000 * self.options.seed
        try:
            output = self.pipe(
                [self.prompts[index] for index in indices],
                num_inference_steps=self.options.num_inference_steps,
                generator=[torch.Generator("cpu").manual_seed(first + index) for index in indices],
                output_type="latent",
                **self.call,
            )
            return content_of(output)
        finally:
            if cache:
                remove_cache(transformer)

    def record(self, index: int, name: str, **cache: Any) -> list[Trajectory]:
        """Return the record of one generation, from the folder where it is there already."""
        path = self.folder / f"{name}-{index:05d}.npz" if self.folder else None
        if path is not None and path.exists():
            return _read(path)
        tokens = self.options.max_tokens
        with Recorder(self.pipe.transformer, self.adapter, tokens) as recorder:
            self.latents(index, **cache)
        found = recorder.take()
        if path is not None:
            _write(path, found)
        return found

    def levels(self) -> np.ndarray:
        """Return the noise levels of the plan that the last generation ran by."""
        return np.array([step.noise_level for step in self.adapter.plan(self.pipe.scheduler)])

    def metadata(self) -> dict[str, Any]:
        """Return what the file says of its origin."""
        model, scheduler = self.pipe.transformer, self.pipe.scheduler
        blocks = sum(len(getattr(model, name)) for name in self.adapter.block_lists)
        return {
            **fingerprint(model, self.adapter.model_class, self.adapter.embedder, blocks),
            "scheduler": type(scheduler).__name__,
            "num_inference_steps": self.options.num_inference_steps,
            "seed": self.options.seed,
            "generations": len(self.prompts),
            "call": self.call,
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
        names = ("gram", "skipped", "errors")
        return [Trajectory(*(held[f"{b}_{name}"] for name in names)) for b in range(count)]


@contextmanager
def saved(fitted: Fitted, output: Path) -> Iterator[str]:
    """Lend a calibration that is not finished a file beside the output."""
    path = output.with_suffix(".unfinished.safetensors")
    # Where no scale is known yet, the gate never skips.
    scales = fitted.scales or {CacheConfig().resolved().significance_level: 0.0}
    replace(fitted, scales=scales).save(path)
    try:
        yield str(path)
    finally:
        path.unlink()

"""Runs one pipeline of xfuser with and without a cache, the same way every time."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from xfuser_fastcache.apply import (
    apply_cache_on_pipeline,
    denoisers_of,
    get_cache_statistics,
    get_cache_trace,
    remove_cache_from_pipeline,
)
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.reports.clips import drawn_by
from xfuser_fastcache.reports.measured import DenoisingTimer, PeakMemory
from xfuser_fastcache.reports.progress import Progress


@dataclass
class Run:
    """One timed generation on this rank.

    Attributes:
        seconds: of the denoising loop.
        peak_bytes: None where the system cannot tell.
        images: pictures in [0, 1], `(height, width, 3)`, or clips, `(frames, height, width, 3)`;
            empty on a rank that holds none.
        statistics: of the cache; empty without one.
        others: likewise of further denoisers, by their names in the pipeline.
        trace: of the decisions of the cache that `statistics` is of; likewise.
    """

    seconds: float
    peak_bytes: int | None
    images: list[np.ndarray] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)


def images_of(ranks: list[Run]) -> list[np.ndarray]:
    """The pictures or clips of all replicas, in order."""
    return [image for run in ranks for image in run.images]


def _call_of(pipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, those that its class knows.

    Args:
        pipe: xfuser's.
        options: flags of xDiT's; `call`, where it is there, holds what no flag can say, `image`
            the path of a picture to begin with.

    Raises:
        ValueError: a negative prompt or a picture that the pipeline does not take, or a picture
            that it needs.
    """
    wanted = {
        **getattr(options, "call", {}),
        "prompt": options.prompt if len(options.prompt) > 1 else options.prompt[0],
        "negative_prompt": options.negative_prompt or None,
        "height": options.height,
        "width": options.width,
        "num_frames": options.num_frames,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "max_sequence_length": options.max_sequence_length,
        "use_resolution_binning": not options.no_use_resolution_binning,
        "output_type": "np",
    }
    path = getattr(options, "image", None)
    wanted["image"] = wanted.get("image") if path is None else _picture(path)
    kind = class_of(pipe)
    known = inspect.signature(kind.__call__).parameters
    for name in ("negative_prompt", "image"):
        if wanted[name] is not None and name not in known:
            raise ValueError(f"{kind.__name__} takes no --{name}; leave it out")
    if "image" in known and known["image"].default is inspect.Parameter.empty:
        if wanted["image"] is None:
            raise ValueError(f"{kind.__name__} begins with a picture: give --image FILE")
    return {k: v for k, v in wanted.items() if v is not None and k in known}


def _picture(path: str) -> Image.Image:
    """Return the picture in a file, in RGB.

    Raises:
        ValueError: it holds none.
    """
    try:
        with Image.open(path) as found:
            return found.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"--image {path} is no picture that can be read: {error}") from error


def class_of(pipe: Any) -> type:
    """Return the class of diffusers that is called, within xfuser's around it."""
    return type(getattr(pipe, "module", pipe))


class Generator:
    """Runs one pipeline of this rank, timed.

    Args:
        pipe: xfuser's.
        options: flags of xDiT's.
        progress: shows titled runs; default as on a terminal or in a file.

    Attributes:
        replica: index of this rank's, where data parallelism has several.
    """

    def __init__(self, pipe: Any, options: argparse.Namespace, progress: Progress | None = None):
        from xfuser.core.distributed import get_data_parallel_rank, get_world_group

        self.pipe = pipe
        self.progress = progress or Progress()
        self.arguments = _call_of(pipe, options)
        self.world = get_world_group()
        self.replica: int = get_data_parallel_rank()
        # Replicas draw their own noise; ranks of one replica the same.
        self.seed = options.seed + self.replica

    def run(self, title: str, config: CacheConfig | None = None, **changes: Any) -> Run:
        """Generate once, cached where a config is given; progress with a title shows on rank 0."""
        pipe = self.pipe
        self._show(title, config is not None)
        if config is not None:
            apply_cache_on_pipeline(pipe, config=config)
        noise = torch.Generator("cpu").manual_seed(self.seed)
        dist.barrier(group=self.world.cpu_group)
        try:
            with PeakMemory() as memory, DenoisingTimer(pipe) as timer:
                output = pipe(**{**self.arguments, "generator": noise, **changes})
            run = Run(timer.seconds, memory.bytes, drawn_by(output))
            if config is not None:
                found = denoisers_of(pipe).items()
                run.others = {name: get_cache_statistics(denoiser) for name, denoiser in found}
                run.statistics = run.others.pop("transformer")
                run.trace = get_cache_trace(pipe.transformer)
        finally:
            if config is not None:
                remove_cache_from_pipeline(pipe)
        return run

    def _show(self, title: str, cached: bool) -> None:
        """Let the pipeline's loop tell its progress to ours."""
        silent = self.world.rank != 0 or not title
        progress = Progress("none") if silent else self.progress
        transformer = self.pipe.transformer

        def skipped() -> float:
            share: float = get_cache_statistics(transformer)["block_approx_ratio"]
            return share

        def progress_bar(iterable: Any = None, total: int | None = None) -> Any:
            if iterable is not None:
                return progress.track(list(iterable), title)
            return progress.task(title, total or 0, skipped if cached else None)

        # On the pipeline of diffusers, also where xfuser's class is around it.
        vars(getattr(self.pipe, "module", self.pipe))["progress_bar"] = progress_bar

    def gather(self, run: Run) -> list[Run]:
        """Return every rank's run on rank 0, nothing elsewhere."""
        ranks = dist.get_world_size()
        rows: list[Any] | None = [None] * ranks if self.world.rank == 0 else None
        dist.gather_object(run, rows, dst=0, group=self.world.cpu_group)
        return rows or []

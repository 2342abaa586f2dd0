"""The pipeline under test: loaded once, called the same way for every method, timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from xfuser_fastcache.benchmarks.settings import Settings
from xfuser_fastcache.reports.clips import drawn_by
from xfuser_fastcache.reports.measured import DenoisingTimer, PeakMemory
from xfuser_fastcache.xdit.groups import XDiTLayout
from xfuser_fastcache.xdit.loaded import (
    known_arguments,
    load_in_layout,
    load_pipeline,
    start,
    xdit_parser,
)
from xfuser_fastcache.xdit.ranks import all_ranks, data_replica

# Of xfuser's own collectives, in seconds.
WAIT_LIMIT_S = 120.0


@dataclass
class Sample:
    """One call of the pipeline.

    Attributes:
        seconds: of the denoising loop; the slowest rank's.
        peak_bytes: the largest rank's; None where the system cannot tell.
        images: pictures in [0, 1], `(height, width, 3)`, or clips, `(frames, height, width, 3)`;
            empty on ranks other than the first.
    """

    seconds: float
    peak_bytes: int | None
    images: list[np.ndarray] = field(default_factory=list)


class Subject:
    """A plain diffusers pipeline in this process.

    Args:
        pipe: the pipeline, on its device.
        steps: of the reference.
        call: further arguments of the pipeline's call.
        calibration: file for the calibrated methods; "" without one.

    Attributes:
        transformer: what caches are put on.
        kept: what a method measured on this pipeline before its first run, such as ratios.
        free_s: seconds of the run that goes on which a method is not charged for.
        computed: steps that the last run computed, the mean over its pictures' branches; None where
            a method does not tell.
    """

    def __init__(self, pipe: Any, steps: int, call: dict[str, Any], calibration: str = ""):
        self.pipe, self.steps, self.call, self.calibration = pipe, steps, call, calibration
        self.kept: dict[str, Any] = {}
        self.free_s = 0.0
        self.computed: float | None = None
        pipe.set_progress_bar_config(disable=True)

    @property
    def name(self) -> str:
        """Folder or hub name that the pipeline was loaded from."""
        return str(self.pipe.config.get("_name_or_path"))

    @property
    def transformer(self) -> torch.nn.Module:
        """The module that the pipeline calls."""
        return self.pipe.transformer

    @property
    def model(self) -> torch.nn.Module:
        """The diffusers model itself."""
        return self.pipe.transformer

    def set_scheduler(self, scheduler: Any) -> None:
        """Let the pipeline run with another scheduler."""
        self.pipe.scheduler = scheduler

    def noise(self, seeds: list[int]) -> list[torch.Generator]:
        """A generator a picture, so that pictures do not depend on the batch."""
        return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def generate(self, prompts: list[str], seeds: list[int], **changes: Any) -> Sample:
        """Call the pipeline once; `changes` win over the subject's own arguments."""
        arguments = {
            "num_inference_steps": self.steps,
            **self.call,
            "prompt": prompts,
            "generator": self.noise(seeds),
            "output_type": "np",
            **changes,
        }
        self.free_s = 0.0
        with PeakMemory() as memory, DenoisingTimer(self.pipe) as timer:
            output = self.pipe(**arguments)
        seconds = timer.seconds - self.free_s
        return self.collect(Sample(seconds, memory.bytes, drawn_by(output)))

    def collect(self, sample: Sample) -> Sample:
        """Bring the ranks' samples together; one process has only its own."""
        return sample

    def needed_calibration(self) -> str:
        """Return the calibration's file.

        Raises:
            FileNotFoundError: there is none.
        """
        if not self.calibration:
            raise FileNotFoundError(
                "there is no calibration of this model; make one with fastcache calibrate "
                "--computed_steps, and give it as --calibration"
            )
        return self.calibration

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return what `measure` gives, measured at the first call under this name."""
        if name not in self.kept:
            self.kept[name] = measure()
        return self.kept[name]


class RankSubject(Subject):
    """The pipeline in xfuser's class, one rank of a layout; the call is collective."""

    @property
    def model(self) -> torch.nn.Module:
        """The diffusers model inside xfuser's wrapper."""
        return self.pipe.transformer.module

    def set_scheduler(self, scheduler: Any) -> None:
        """Put the scheduler under xfuser's pipeline; it is not split over patches."""
        self.pipe.module.scheduler = scheduler

    def noise(self, seeds: list[int]) -> list[torch.Generator]:
        """The generators of this data-parallel replica's share of the batch."""
        replica, replicas = data_replica()
        share = -(-len(seeds) // replicas)
        start = replica * share
        return super().noise(seeds[start : start + share])

    def collect(self, sample: Sample) -> Sample:
        """Slowest rank, largest memory, all replicas' pictures on the first rank."""
        ranks = all_ranks(sample)
        peaks = [rank.peak_bytes for rank in ranks if rank.peak_bytes is not None]
        images = [image for rank in ranks for image in rank.images] if dist.get_rank() == 0 else []
        return Sample(max(rank.seconds for rank in ranks), max(peaks, default=None), images)


def load_subject(settings: Settings) -> Subject:
    """Load the model as the settings ask for it.

    In one process it is diffusers' own pipeline. xfuser's groups of one rank are set up beside it
    by the methods that need them.
    """
    if settings.layout:
        return _load_rank(settings)
    pipe = load_pipeline(settings.model, settings.dtype)
    call = known_arguments(pipe, settings.call)
    return Subject(pipe, settings.steps, call, settings.calibration)


def _load_rank(settings: Settings) -> RankSubject:
    start()
    size = settings.call.get("height"), settings.call.get("width")
    flags = ["--model", settings.model, "--num_inference_steps", str(settings.steps)]
    flags += [f"--{name}={px}" for name, px in zip(("height", "width"), size, strict=True) if px]
    options = xdit_parser().parse_args([*flags, *settings.layout_flags()])
    pipe = load_in_layout(options, settings.dtype)
    # A peer whose ranks decide each for itself may leave some waiting.
    XDiTLayout().limit_waits(WAIT_LIMIT_S)
    call = known_arguments(pipe.module, settings.call)
    return RankSubject(pipe, settings.steps, call, settings.calibration)

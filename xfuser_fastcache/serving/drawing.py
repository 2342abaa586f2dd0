"""One request on one rank: the pipeline's call, with the cache that the request asks for."""

from __future__ import annotations

import argparse
import base64
import functools
import inspect
import io
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.artifacts.calibration import load_fitted
from xfuser_fastcache.clock.schedule import Schedule
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.config.methods import budget_of
from xfuser_fastcache.reports.clips import animation, are_clips
from xfuser_fastcache.reports.measured import picture_of
from xfuser_fastcache.reports.progress import Progress, Task
from xfuser_fastcache.reports.views import decision_rows
from xfuser_fastcache.serving.requests import Limits
from xfuser_fastcache.xdit.generator import Generator, class_of
from xfuser_fastcache.xdit.groups import XDiTLayout
from xfuser_fastcache.xdit.ranks import runtime_state, sequence_ranks

logger = logging.getLogger("xfuser_fastcache")

# Where a rank meets an error: before the model is called, in its work with others, or when that is
# done.
PLACES = ("before", "within", "after")
_TRIAL_SIDE = 256
_TRIAL_STEPS = 2


class Step(NamedTuple):
    """How far a picture is.

    Attributes:
        done: steps.
        of: so many.
        skipped: share of blocks that was skipped so far, 0 to 1.
    """

    done: int
    of: int
    skipped: float


class Told(Progress):
    """Tells how far a pipeline is, by what this rank knows, in place of showing it.

    Args:
        tell: called at the beginning and after each step; it must not wait.
    """

    def __init__(self, tell: Callable[[Step], None]):
        super().__init__("none")
        self.tell = tell

    def task(self, title: str, total: int, skipped: Callable[[], float] | None = None) -> Task:
        """Return a task to be entered."""
        return _ToldTask(self, title, total, skipped)


class _ToldTask(Task):
    progress: Told

    def __enter__(self) -> Task:
        self.progress.tell(Step(0, self.total, 0.0))
        return super().__enter__()

    def reach(self, done: int) -> None:
        super().reach(done)
        self.progress.tell(Step(done, self.total, self.skipped() if self.skipped else 0.0))


class Painter:
    """Runs orders on this rank, one after another, each as if it were the first.

    Args:
        pipe: xfuser's pipeline.
        options: the service's flags.
        config: the service's cache, or None.
    """

    def __init__(self, pipe: Any, options: argparse.Namespace, config: CacheConfig | None):
        self.pipe = pipe
        self.options = options
        self.config = config
        self.layout = XDiTLayout()
        self.runtime = runtime_state()
        self.pipeline_warmup_steps = self.runtime.runtime_config.warmup_steps
        self.entered = self.drawn = False
        self.layout.limit_waits((config or CacheConfig()).sync_timeout_s)
        pipe.transformer.register_forward_pre_hook(self._enter)

    def limits(self) -> Limits:
        """Return what this model in this layout can draw."""
        inner = getattr(self.pipe, "module", self.pipe)  # xfuser's class around a pipeline
        model: Any = self.layout.model_of(self.pipe.transformer)
        of_vae = next(
            getattr(held, name)
            for held in (self.runtime, inner)  # xDiT's own, where it cuts pictures by it
            for name in ("vae_scale_factor", "vae_scale_factor_spatial")
            if hasattr(held, name)
        )
        patch = model.config.get("patch_size") or 1
        # FLUX packs its latent two by two outside of the transformer, whose own patch is 1.
        pixels = of_vae * max(2, patch if isinstance(patch, int) else patch[-1])
        # SD3's table of positions ends somewhere.
        most = model.config.get("pos_embed_max_size") or math.inf
        return Limits(
            max_side=int(min(self.options.max_side, most * pixels)),
            # xDiT deals the rows of the latent out to the ranks of a sequence.
            height_multiple=pixels * sequence_ranks(),
            width_multiple=pixels,
            max_steps=self.options.max_steps,
            max_prompt_length=self.options.max_prompt_length,
            negative_prompts="negative_prompt"
            in inspect.signature(class_of(self.pipe).__call__).parameters,
            two_branches=self.options.use_cfg_parallel,
        )

    def attempt(
        self, order: dict[str, Any], tell: Callable[[Step], None] = lambda _: None
    ) -> dict[str, Any]:
        """Run an order and return this rank's report, of an error too.

        Args:
            order: what all ranks run.
            tell: called on rank 0 after each step; it must not wait.

        Returns:
            `error`, None where there is none; `place`, one of `PLACES`, where the error was met;
            `memory_bytes`; and of a success `seconds` of the denoising loop, `statistics` of the
            cache, of further denoisers under their names, `decisions` as `decision_rows` gives
            them, and on the rank that has it `picture`, a
            PNG in base64; of a video a moving one.
        """
        self.entered = self.drawn = False
        try:
            report = self._draw(order, tell)
        except Exception as error:
            if self.entered:
                logger.exception("a generation failed")
            report = {"error": f"{type(error).__name__}: {error}"}
        before, within, after = PLACES
        place = after if self.drawn else within if self.entered else before
        return {"error": None, "place": place, "memory_bytes": memory_bytes(), **report}

    def trial(self) -> dict[str, Any]:
        """Return an order for a small picture that this service can draw.

        Its cache skips nothing: it is there because ranks that apply one meet and mend what an
        earlier failure has left between them.
        """
        limits, kept = self.limits(), self.config or CacheConfig()
        cache = {
            **{"use_cache": "Fast", "cache_ratio_threshold": 0.0},
            **{"sync_backend": kept.sync_backend, "sync_timeout_s": kept.sync_timeout_s},
        }
        sides = {
            name: max(multiple, min(_TRIAL_SIDE, limits.max_side) // multiple * multiple)
            for name, multiple in (
                ("height", limits.height_multiple),
                ("width", limits.width_multiple),
            )
        }
        return {
            **{"prompt": "a trial", "negative_prompt": None, "seed": 0, "cache": cache},
            **{"guidance_scale": self.options.guidance_scale},
            **{"num_inference_steps": min(_TRIAL_STEPS, limits.max_steps)},
            **sides,
        }

    def _enter(self, *_: Any) -> None:
        self.entered = True

    def _draw(self, order: dict[str, Any], tell: Callable[[Step], None]) -> dict[str, Any]:
        config = self.config if order["cache"] is True else None
        if isinstance(order["cache"], dict):
            config = CacheConfig.from_dict(order["cache"])
        # xDiT lowers it to the steps of a short generation, and leaves it there.
        self.runtime.runtime_config.warmup_steps = self.pipeline_warmup_steps
        changes = {**order, "prompt": [order["prompt"]]}
        options = argparse.Namespace(**{**vars(self.options), **changes})
        generator = Generator(self.pipe, options, Told(tell))
        with self._planned(config):
            run = generator.run("a request", config)
        self.drawn = True
        statistics = {**run.statistics, **run.others}
        report: dict[str, Any] = {
            "seconds": run.seconds,
            "statistics": statistics,
            "decisions": decision_rows(run.trace),
        }
        if run.images:
            if not np.isfinite(run.images[0]).all():
                raise ValueError(
                    "the picture holds NaN or infinity; give other options of the cache, or "
                    "use_cache=false"
                )
            report["picture"] = base64.b64encode(png_of(run.images)).decode()
        return report

    @contextmanager
    def _planned(self, config: CacheConfig | None) -> Iterator[None]:
        """Refuse a plan of steps that a schedule does not fit, as it is made.

        The cache would refuse it at the first step. Then a later stage of a pipeline already waits
        for the first one; here every rank still refuses alike.
        """
        if config is None or (config.calibration and budget_of(config)):
            # What a calibration does not cover goes on without it.
            yield
            return
        fitted = load_fitted(config.calibration) if config.calibration else None
        schedule = Schedule.of(config.resolved(fitted))
        if schedule is None:
            yield
            return
        # xDiT's wrapper hands what is set on it to the scheduler, but does not take it back.
        scheduler = getattr(self.pipe.scheduler, "module", self.pipe.scheduler)
        adapter = adapter_of(self.layout.model_of(self.pipe.transformer))
        plan = scheduler.set_timesteps

        @functools.wraps(plan)
        def checked(*arguments: Any, **options: Any) -> None:
            plan(*arguments, **options)
            levels = [step.noise_level for step in adapter.plan(scheduler)]
            refused = schedule.refuses(len(levels), len(levels))
            if refused:
                raise ValueError(refused)

        scheduler.set_timesteps = checked
        try:
            yield
        finally:
            del scheduler.set_timesteps


def png_of(images: list[np.ndarray]) -> bytes:
    """Return a picture as PNG, or a clip as a moving one."""
    if are_clips(images):
        return animation(images, ".png")
    file = io.BytesIO()
    picture_of(images[0]).save(file, format="PNG")
    return file.getvalue()


def memory_bytes() -> int | None:
    """Memory of this rank in bytes: allocated on the GPU, or resident; None where unknown."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024

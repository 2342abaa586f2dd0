"""What the cache costs besides time: memory, host synchronisations, kernels of its own."""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from xfuser_fastcache.apply import get_cache_statistics
from xfuser_fastcache.benchmarks.gpu.record import Figures, LeftOut
from xfuser_fastcache.benchmarks.gpu.speed import NEVER, UNCACHED
from xfuser_fastcache.benchmarks.gpu.subject import Subject, computed_mask
from xfuser_fastcache.measurements.moments import Reference, measure

MEMORY_FORECASTERS = ("reuse", "taylor", "damped_taylor", "taylor2", "output", "data")
MEMORY_FORECASTERS_LONG = ("damped_taylor", "output", "data")
_TORCH = str(Path(torch.__file__).parent)
_PROFILED_STEPS = 4


def _needs_gpu(subject: Subject) -> None:
    if subject.device.type != "cuda":
        raise LeftOut("needs a GPU")


def memory(subject: Subject, forecaster: str | None) -> Figures:
    """Return the peak of allocated memory over a generation, uncached for None.

    A mask skips 64 % of the steps, so that each forecaster holds as many anchors as it ever does.
    """
    _needs_gpu(subject)
    # What an earlier cache has left in cycles would be freed somewhere within this generation.
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    figures: Figures = {}
    if forecaster is None:
        subject.denoise()
    else:
        mask = computed_mask(subject.steps, 0.64)
        with subject.cached(forecaster=forecaster, steps_mask=mask):
            subject.denoise()
            figures["cache_bytes"] = get_cache_statistics(subject.model)["cache_bytes"]
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    after = torch.cuda.memory_allocated()
    gc.collect()
    return {
        "peak_bytes": peak,
        "held_before_bytes": before,
        "added_bytes": peak - before,
        # What only Python's collector of cycles frees.
        "left_in_cycles_bytes": after - torch.cuda.memory_allocated(),
        **figures,
    }


# ---- host synchronisations ----------------------------------------------------------------------


def _place(stack: list[traceback.FrameSummary]) -> str:
    """Return the innermost line outside of torch, as `folder/file.py:line`."""
    for frame in reversed(stack):
        own = frame.filename == __file__ and frame.name == "note"
        if not own and not frame.filename.startswith(_TORCH) and "warnings" not in frame.filename:
            return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
    return "unknown"


def synchronisations(subject: Subject, options: dict[str, Any] | None) -> Figures:
    """Return where the host waits for the device in three steps, as torch reports it.

    Args:
        subject: is run.
        options: of the cache; None for uncached.
    """
    _needs_gpu(subject)
    places: list[Counter[str]] = []

    def note(message: Any, *others: Any, **more: Any) -> None:
        if "synchroniz" in str(message) and places:
            places[-1][_place(traceback.extract_stack())] += 1

    with nullcontext() if options is None else subject.cached(**options):
        subject.plan(3)
        subject.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            # It says first that it is a prototype.
            torch.cuda.set_sync_debug_mode("warn")
            warnings.showwarning = note
            try:
                subject.denoise(planned=True, each_step=lambda step: places.append(Counter()))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        subject.synchronize()
    total = sum(places, Counter())
    return {
        "steps": len(places),
        "of_each_step": [sum(step.values()) for step in places],
        "in_a_later_step": sum(places[-1].values()),
        "places": dict(total.most_common()),
    }


# ---- kernels ------------------------------------------------------------------------------------


def moments(subject: Subject, uncached_ms: float, repeat: int) -> Figures:
    """Time the measurement of what enters the blocks, alone, at the real shape.

    Args:
        subject: whose shape it is.
        uncached_ms: milliseconds of a step; 0 where that is not known.
        repeat: calls a run; the median of 5 runs counts, each back to back.
    """
    shape = (subject.family.batch, subject.shape.image_tokens, subject.shape.width)
    one, other = subject.draw(*shape), subject.draw(*shape)
    reference = Reference.of(other)
    microseconds: dict[str, float] = {}
    for name, call in (
        ("measure_us", lambda: measure(one, reference, 4)),
        ("reference_us", lambda: Reference.of(other)),
    ):
        runs = []
        call()
        for _ in range(5):
            subject.synchronize()
            started = time.perf_counter()
            for _ in range(repeat):
                call()
            subject.synchronize()
            runs.append((time.perf_counter() - started) * 1e6 / repeat)
        microseconds[name] = median(runs)
    figures: Figures = {"shape": list(shape), **microseconds}
    if uncached_ms:
        figures["share_of_step"] = microseconds["measure_us"] / 1000 / uncached_ms
    return figures


def kernels(subject: Subject) -> Figures:
    """Return the time that kernels take a step, by torch's profiler, and those of `measure`."""
    _needs_gpu(subject)

    def profiled(options: dict[str, Any] | None) -> tuple[float, int]:
        with nullcontext() if options is None else subject.cached(**options):
            return _kernels_of(lambda: subject.denoise(_PROFILED_STEPS))

    uncached_us, uncached_count = profiled(None)
    cached_us, cached_count = profiled({"cache_ratio_threshold": NEVER})
    shape = (subject.family.batch, subject.shape.image_tokens, subject.shape.width)
    one, reference = subject.draw(*shape), Reference.of(subject.draw(*shape))
    own_us, own_count = _kernels_of(lambda: measure(one, reference, 4))
    return {
        f"{UNCACHED}_us_a_step": uncached_us / _PROFILED_STEPS,
        "gate_never_passes_us_a_step": cached_us / _PROFILED_STEPS,
        f"{UNCACHED}_kernels_a_step": uncached_count / _PROFILED_STEPS,
        "gate_never_passes_kernels_a_step": cached_count / _PROFILED_STEPS,
        "measure_us": own_us,
        "measure_kernels": own_count,
        "measure_share_of_step": own_us * _PROFILED_STEPS / uncached_us,
    }


def _kernels_of(call: Any) -> tuple[float, int]:
    """Return microseconds and number of what ran on the device in a call."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    rows = [row for row in profiler.key_averages() if row.self_device_time_total > 0]
    if not rows:
        raise LeftOut("torch's profiler saw nothing on the device")
    return sum(row.self_device_time_total for row in rows), sum(row.count for row in rows)

"""What a run took and how its pictures compare: time of the denoising loop, memory, quality."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


def now() -> float:
    """Return a clock in seconds, once the GPU has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class DenoisingTimer:
    """Times the denoising loop of a pipeline on this rank, without text encoding and VAE.

    From the transformer's first call to the VAE's, or to the end of the pipeline's call on a rank
    that does not decode. Used as a context around the pipeline's call.

    Args:
        pipe: a diffusers pipeline or xfuser's class around one.

    Attributes:
        seconds: of the last run.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.seconds = 0.0
        self._marks: list[float] = []
        self._handles: list[Any] = []

    def _mark(self, *_: Any) -> None:
        self._marks.append(now())

    def _mark_first(self, *_: Any) -> None:
        if not self._marks:
            self._mark()

    def __enter__(self) -> DenoisingTimer:
        self._marks = []
        self._handles = [
            self.pipe.transformer.register_forward_pre_hook(self._mark_first),
            self.pipe.vae.decoder.register_forward_pre_hook(self._mark),
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._mark()
        for handle in self._handles:
            handle.remove()
        if kind is None:
            self.seconds = self._marks[1] - self._marks[0]


class PeakMemory:
    """Peak memory of this process within a context: of the GPU, or resident on the host.

    Attributes:
        bytes: the peak; None where the system cannot tell.
    """

    bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            # Linux starts the peak of the resident size anew when 5 is written here.
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                self._unknown = True
        return self

    _unknown = False

    def __exit__(self, *_: Any) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
        elif not self._unknown:
            status = Path("/proc/self/status").read_text()
            (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
            self.bytes = int(line.split()[1]) * 1024


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures in [0, 1], `(height, width, 3)`, in dB."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(image, reference):
        return float("inf")
    return float(peak_signal_noise_ratio(reference, image, data_range=1.0))


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of two pictures in [0, 1], `(height, width, 3)`; 1 where equal."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(reference, image, data_range=1.0, channel_axis=-1))


def compared(images: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return `psnr_db`, `identical` and `ssim` of pictures against others, in pairs.

    A pair that is equal to the bit has no finite ratio, which JSON knows neither: the mean is over
    the others, and None where there are none.
    """
    pairs = list(zip(images, references, strict=True))
    finite = [ratio for ratio in (psnr_db(*pair) for pair in pairs) if np.isfinite(ratio)]
    return {
        "psnr_db": sum(finite) / len(finite) if finite else None,
        "identical": bool(pairs) and not finite,
        "ssim": float(np.mean([ssim(*pair) for pair in pairs])) if pairs else None,
    }


def picture_of(image: np.ndarray) -> Any:
    """Return an image in [0, 1], `(height, width, 3)`, as an 8-bit PIL picture."""
    from PIL import Image

    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))


def environment(*packages: str) -> dict[str, Any]:
    """Return what figures depend on: versions of packages and of Python, device and threads."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": gpu or f"CPU, {os.cpu_count()} cores, no GPU",
        "threads_per_process": torch.get_num_threads(),
    }

"""The embedded toys on the device: trained weights, so that pictures can be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xfuser_fastcache.apply import (
    apply_cache_on_transformer,
    get_cache_statistics,
    get_cache_trace,
    remove_cache,
)
from xfuser_fastcache.benchmarks.gpu.families import FAMILIES
from xfuser_fastcache.benchmarks.gpu.record import Figures, LeftOut
from xfuser_fastcache.benchmarks.gpu.subject import same_bits
from xfuser_fastcache.reports.clips import content_of

# The calibrations are for the first one, and for this number of steps.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = 28


def psnr_db(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return the peak signal-to-noise ratio of pictures in [0, 1], in dB; None where equal.

    Example:
        >>> psnr_db(np.zeros(4), np.full(4, 0.1))
        20.0
    """
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return None if error == 0 else round(float(-10 * np.log10(error)), 6)


def toy(
    name: str,
    folder: Path,
    device: torch.device,
    dtype: str,
    pictures: int,
    mask: list[int] | None = None,
) -> Figures:
    """Draw with a toy: uncached, with a threshold of 0, and twice with its calibration's mask.

    A calibration is for its own dtype. In another one its mask alone is used, with the output
    forecast as it is without corrections.

    Args:
        name: of the family, and of the toy's folder.
        folder: that holds the toys.
        device, dtype: of the pipeline.
        pictures: of one call.
        mask: the calibration's, as the figures of a run in its own dtype give it; None where this
            is that run.
    """
    path = folder / name
    if not path.is_dir():
        raise LeftOut(f"no toy in {path}; give --toys FOLDER")
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(path, local_files_only=True)
    pipe.to(device, DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    lines = (folder / "prompts_64.txt").read_text(encoding="utf-8").splitlines()

    def draw(output_type: str) -> Any:
        output = pipe(
            prompt=lines[:pictures],
            height=128,
            width=128,
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(seed) for seed in range(pictures)],
            output_type=output_type,
            **(FAMILIES[name].toy or {}),
        )
        return content_of(output)

    def cached(run: Callable[[], Any], **options: Any) -> tuple[Any, dict[str, Any]]:
        apply_cache_on_transformer(
            pipe.transformer, scheduler=pipe.scheduler, use_cache="Fast", **options
        )
        try:
            return run(), get_cache_statistics(pipe.transformer)
        finally:
            remove_cache(pipe.transformer)

    plain = draw("latent")
    zero, _ = cached(lambda: draw("latent"), cache_ratio_threshold=0)
    picture = draw("np")
    options: dict[str, Any] = {"forecaster": "output", "steps_mask": mask}
    if mask is None:
        options = {
            "calibration": str(path / "fastcache.safetensors"),
            "computed_steps": FAMILIES[name].toy_steps,
        }

    def traced() -> tuple[Any, list[int]]:
        drawn = draw("np")
        trace = get_cache_trace(pipe.transformer)
        return drawn, [int(row["decision"] != "skipped") for row in trace]

    (first, used), statistics = cached(traced, **options)
    (second, _), again = cached(traced, **options)
    return {
        "calibrated": mask is None,
        "mask": used,
        "pictures": pictures,
        "threshold_0_identical": same_bits(plain, zero),
        "digest_repeats": statistics["decisions_digest"] == again["decisions_digest"],
        "picture_repeats": bool(np.array_equal(first, second)),
        "share_skipped": statistics["block_approx_ratio"],
        "psnr_db": psnr_db(picture, first),
    }

"""Clips beside each other: likeness by frame, flicker, a sheet of frames, a moving picture."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xfuser_fastcache.artifacts.file import replace_file
from xfuser_fastcache.reports.measured import compared, picture_of
from xfuser_fastcache.reports.views import MAX_COLUMNS, comparison_sheet

# What Pillow writes as a moving picture, and how without loss.
_FORMATS = {".webp": {"lossless": True}, ".png": {}, ".gif": {}}


def content_of(output: Any) -> Any:
    """Return what a pipeline has drawn, pictures, clips or latents: a batch of them.

    Video pipelines of diffusers call it `frames`, others `images`.
    """
    return output.frames if hasattr(output, "frames") else output.images


def drawn_by(output: Any) -> list[np.ndarray]:
    """Return the pictures or clips of a pipeline's output; none where it is None."""
    return [] if output is None else list(content_of(output))


def are_clips(drawn: Sequence[np.ndarray]) -> bool:
    """Say whether a pipeline has drawn clips; an empty list is none."""
    return bool(drawn) and drawn[0].ndim == 4


def flicker(clip: np.ndarray, reference: np.ndarray) -> float:
    """Return how much a clip's error changes from a frame to the next; 0 where it stands still.

    sqrt(mean((e[t + 1] - e[t])^2)) with e = clip - reference. An error that stands still is a
    stain; one that changes is what the eye sees flicker.

    Args:
        clip: values in [0, 1], `(frames, height, width, 3)`, at least 2 frames.
        reference: of the same shape.

    Raises:
        ValueError: the shapes differ, or there is a single frame.
    """
    if clip.shape != reference.shape or len(clip) < 2:
        raise ValueError(
            f"the clip is {clip.shape} and its reference {reference.shape}: give two of one shape "
            "(frames, height, width, 3) with at least 2 frames"
        )
    error = clip.astype(np.float64) - reference.astype(np.float64)
    return float(np.sqrt(np.mean(np.diff(error, axis=0) ** 2)))


def compared_clips(clips: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> dict[str, Any]:
    """Compare clips with others, in pairs of one shape `(frames, height, width, 3)`.

    Returns:
        `psnr_db`, `identical` and `ssim` as `compared` has them, over all frames;
        `psnr_db_by_frame` and `ssim_by_frame`, means over the clips; `flicker`, likewise.

    Raises:
        ValueError: the numbers of clips, or the shapes of a pair, differ.
    """
    ours, theirs = np.stack(clips), np.stack(references)
    if ours.shape != theirs.shape:
        raise ValueError(f"clips are {ours.shape} and references {theirs.shape}: give them alike")
    frames = range(ours.shape[1])
    by_frame = [compared(list(ours[:, index]), list(theirs[:, index])) for index in frames]
    return {
        **compared(list(np.concatenate(ours)), list(np.concatenate(theirs))),
        "psnr_db_by_frame": [frame["psnr_db"] for frame in by_frame],
        "ssim_by_frame": [frame["ssim"] for frame in by_frame],
        "flicker": float(np.mean([flicker(*pair) for pair in zip(ours, theirs, strict=True)])),
    }


def clip_sheet(baseline: np.ndarray, cached: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Draw frames of a clip, of its cached twin and of their difference (10 times), as PNG.

    A frame has a column; of more than 8 frames, 8 at even distances with both ends.

    Args:
        baseline: uncached, in [0, 1], `(frames, height, width, 3)`.
        cached: of the same shape.
        path: of the file; one that is there is replaced.

    Raises:
        ValueError: the shapes differ.
        OSError: the file cannot be written.
    """
    count = min(len(baseline), MAX_COLUMNS)
    shown = np.linspace(0, len(baseline) - 1, count).round().astype(int)
    titles = [f"frame {index}" for index in shown]
    comparison_sheet(baseline[shown], cached[shown], titles, path)


def save_animation(
    clips: Sequence[np.ndarray], path: str | os.PathLike[str], fps: float = 8.0
) -> None:
    """Write clips side by side as one moving picture that repeats for ever.

    Args:
        clips: in [0, 1], each `(frames, height, width, 3)`, of one shape.
        path: of the file; its ending says the format: .webp and .png without loss, or .gif.
        fps: frames per second.

    Raises:
        ValueError: another ending, no frames per second, or clips of several shapes.
        OSError: the file cannot be written.
    """
    ending = Path(path).suffix.lower()
    if ending not in _FORMATS:
        raise ValueError(f"{path}: a moving picture ends in one of {', '.join(_FORMATS)}")
    replace_file(path, animation(clips, ending, fps))


def animation(clips: Sequence[np.ndarray], ending: str, fps: float = 8.0) -> bytes:
    """Return the bytes of the file that `save_animation` writes; `ending` is the path's."""
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in side_by_side(clips, fps)]
    moving = io.BytesIO()
    frames[0].save(
        moving,
        format=ending[1:],
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / fps),
        loop=0,
        **_FORMATS[ending],
    )
    return moving.getvalue()


def side_by_side(clips: Sequence[np.ndarray], fps: float) -> np.ndarray:
    """Return clips side by side as bytes, `(frames, height, sum of widths, 3)`.

    Args:
        clips: in [0, 1], each `(frames, height, width, 3)`, of one shape.
        fps: frames per second at which they are to be shown.

    Raises:
        ValueError: no frames per second, or clips of several shapes.
    """
    if not fps > 0:
        raise ValueError(f"fps={fps}: give more than 0 frames per second")
    shapes = {clip.shape for clip in clips}
    if len(shapes) != 1:
        raise ValueError(f"clips of {sorted(shapes)} do not go side by side: give one shape")
    return np.stack([np.asarray(picture_of(f)) for f in np.concatenate(list(clips), axis=2)])


def difference(baseline: np.ndarray, cached: np.ndarray) -> np.ndarray:
    """Return 10 times what two clips in [0, 1] differ by, as a clip in [0, 1]."""
    return np.clip(10 * np.abs(cached - baseline), 0, 1)

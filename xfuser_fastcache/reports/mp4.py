"""Clips as mp4, where PyAV is installed; xfuser 0.7 brings it."""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np

from xfuser_fastcache.artifacts.file import replace_file
from xfuser_fastcache.reports.clips import save_animation, side_by_side

logger = logging.getLogger("xfuser_fastcache")

WITHOUT = "mp4 needs PyAV: pip install 'xfuser-fastcache[video]'"
# No version of the library's is in it. Of H.264: what the eye does not tell from the original.
_FILE = {"fflags": "+bitexact"}
_QUALITY = {"crf": "16", "preset": "medium"}


def writes_mp4() -> bool:
    """Say whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def mp4(clips: Sequence[np.ndarray], fps: float) -> bytes:
    """Return clips side by side as an H.264 film, the same bytes each time.

    Colours have half the resolution, as all players expect; an odd height or width gets its last
    row or column once more.

    Args:
        clips: in [0, 1], each `(frames, height, width, 3)`, of one shape.
        fps: frames per second.

    Raises:
        ValueError: PyAV is missing, no frames per second, or clips of several shapes.

    Source: PyAV's cookbook for making videos from arrays.
    """
    if not writes_mp4():
        raise ValueError(WITHOUT)
    import av

    frames = [
        np.pad(frame, ((0, -len(frame) % 2), (0, -frame.shape[1] % 2), (0, 0)), "edge")
        for frame in side_by_side(clips, fps)
    ]
    film = io.BytesIO()
    with av.open(film, "w", format="mp4", options=_FILE) as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options=_QUALITY)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return film.getvalue()


def save_film(clips: Sequence[np.ndarray], path: Path, fps: float) -> None:
    """Write clips side by side as PATH.webp, without loss, and as PATH.mp4 beside it.

    Without PyAV the first alone is written, and a warning says so once.

    Args:
        clips: as of `mp4`.
        path: of the files, without their endings.
        fps: frames per second.

    Raises:
        ValueError: as `mp4`, but for PyAV.
        OSError: a file cannot be written.
    """
    save_animation(clips, f"{path}.webp", fps)
    if writes_mp4():
        replace_file(f"{path}.mp4", mp4(clips, fps))
    else:
        _say_once()


@cache
def _say_once() -> None:
    logger.warning("clips are written as WebP alone: %s. (Said once.)", WITHOUT)

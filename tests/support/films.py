"""Films of tiny pipelines, read back."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np


def frames_of(film: Path | bytes) -> np.ndarray:
    """Return the frames of an mp4, `(frames, height, width, 3)`, in bytes."""
    held = io.BytesIO(film) if isinstance(film, bytes) else str(film)
    with av.open(held) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])

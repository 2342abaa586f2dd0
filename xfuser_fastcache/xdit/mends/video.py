"""What video needs and neither xfuser nor diffusers brings, where it is missing."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from xfuser_fastcache.reports.mp4 import mp4, writes_mp4
from xfuser_fastcache.xdit.compat import replace, require

RUNNER = "xfuser.model_executor.models.runner_models"
WRITER = "export_to_video"
PIPELINES = "diffusers.pipelines.wan"
CLEANER = "basic_clean"


def needs_ffmpeg(source: str) -> bool:
    """diffusers writes videos with imageio, which needs imageio-ffmpeg; xfuser asks for PyAV."""
    return "imageio.get_writer" in source


def write_by_pyav(module: ModuleType) -> None:
    """Let the runner write videos with PyAV where imageio-ffmpeg is missing."""
    write = require(module, WRITER)

    @functools.wraps(write)
    def write_with_what_is_there(
        video_frames: list[Any], output_video_path: str, fps: int = 10, **options: Any
    ) -> str:
        if find_spec("imageio_ffmpeg") is not None or not writes_mp4():
            found: str = write(video_frames, output_video_path, fps=fps, **options)
            return found
        frames = np.stack([np.asarray(frame) for frame in video_frames])
        clip = frames / 255 if frames.dtype == np.uint8 else frames
        Path(output_video_path).write_bytes(mp4([clip], fps))
        return output_video_path

    replace(module, WRITER, write_with_what_is_there)


def calls_ftfy_unasked(source: str) -> bool:
    """ftfy is called whether or not it is there; Wan's pipeline for text asks first."""
    return "ftfy." in source and "is_ftfy_available" not in source


def leave_characters(module: ModuleType) -> None:
    """Leave a prompt's characters as they are, as Wan's pipeline for text does without ftfy."""
    vars(module).setdefault("ftfy", SimpleNamespace(fix_text=str))


# What they break, module, function, and how it is recognised and mended; see `Mend`.
FOUND = (
    (
        "xDiT's runner without imageio-ffmpeg: no video can be written",
        f"{RUNNER}.base_model",
        WRITER,
        needs_ffmpeg,
        write_by_pyav,
    ),
    *(
        (
            f"{name} without ftfy: prompts crash in diffusers' pipeline",
            f"{PIPELINES}.{module}",
            CLEANER,
            calls_ftfy_unasked,
            leave_characters,
        )
        for name, module in (
            ("Wan image to video", "pipeline_wan_i2v"),
            ("Wan VACE", "pipeline_wan_vace"),
        )
    ),
)

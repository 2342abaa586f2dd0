"""One rank of xDiT's runner with what this machine may lack: ffmpeg for videos, ftfy for I2V.

The first argument is the folder in which models lie by the names of xDiT's registry.
Videos are written as arrays of frames. diffusers' image-to-video pipeline of Wan calls ftfy, which
cleans prompts, without asking whether it is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from diffusers.pipelines.wan import pipeline_wan_i2v, pipeline_wan_vace

from xfuser_fastcache.xdit import cpu_platform, runner


def write_frames(video: Any, path: str, fps: int) -> None:
    """Take the place of diffusers' `export_to_video`."""
    np.save(Path(path).with_suffix(".npy"), np.stack([np.asarray(frame) for frame in video]))


if __name__ == "__main__":
    os.chdir(sys.argv.pop(1))
    cpu_platform.enable_cpu_platform()
    from xfuser.model_executor.models.runner_models import base_model

    base_model.export_to_video = write_frames
    for pipeline in (pipeline_wan_i2v, pipeline_wan_vace):
        if not hasattr(pipeline, "ftfy"):
            pipeline.ftfy = SimpleNamespace(fix_text=str)
    runner.run()

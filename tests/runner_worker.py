"""One rank of xDiT's runner, with what this machine may lack and for pictures of 64 x 64 pixels.

The first argument is the folder in which models lie by the names of xDiT's registry. Films with
sound, LTX-2's, are written as arrays of frames. Pictures to edit are made a megapixel by diffusers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

from xfuser_fastcache.xdit import cpu_platform, runner


def write_frames(video: Any, output_path: str = "", **_: Any) -> None:
    """Take the place of xfuser's `encode_video_with_audio`."""
    frames = np.stack([np.asarray(frame) for frame in video])
    np.save(Path(output_path).with_suffix(".npy"), frames)


if __name__ == "__main__":
    os.chdir(sys.argv.pop(1))
    cpu_platform.enable_cpu_platform()
    from xfuser.model_executor.models.runner_models import ltx

    ltx.encode_video_with_audio = write_frames
    pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(64, 64)]
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (64, 64, None)
    runner.run()

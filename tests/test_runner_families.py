"""`xdit-fastcache` on a tiny pipeline of each family, which lies where xDiT's registry points.

What its command runs on each rank, on two ranks; `test_runner.py` runs the command itself, on toys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.films import frames_of
from support.hub import save
from support.worlds import launch

from diffusers_adapters.tiny.model import picture
from xfuser_fastcache.xdit.families import FAMILIES, family_of

STEPS, FRAMES, SIDE = 14, 9, 64
# Pipelines leave the first words out, which are those of their templates.
CALL = (
    "--prompt", "ring " * 120, "--height", str(SIDE), "--width", str(SIDE),
    "--num_inference_steps", str(STEPS), "--seed", "1",
    "--cache_method", "fastcache", "--cache_config", '{"cache_ratio_threshold":12.0}',
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What is started, and what it leaves.

    Attributes:
        name: in the registry of xDiT's runner.
        hub: what it loads for that.
        flags: of xDiT, beside `CALL` or in place of a part of it.
        steps: of all denoisers together, those of a second stage among them.
        denoisers: that run on the rank that reports.
        slow: whether it is left out unless asked for.
    """

    name: str
    hub: str
    flags: str
    steps: int = STEPS
    denoisers: int = 1
    slow: bool = True


ULYSSES, RING, CFG = "--ulysses_degree 2", "--ring_degree 2", "--use_cfg_parallel"
PIPEFUSION = "--pipefusion_parallel_degree 2"
EDIT = "--input_images image.png"
_FLUX2, _KLEIN = "black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-klein-4B"
_KONTEXT = "black-forest-labs/FLUX.1-Kontext-dev"
_SHORT = "--max_sequence_length 16"
_HUNYUAN15 = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v"
_VIDEO = f"--num_frames {FRAMES} --height 32 --width 32"
_LTX2 = "--num_frames 17 --height 128 --width 128"
STARTS = (
    Start("FLUX.2-klein-4B", _KLEIN, f"{PIPEFUSION} {_SHORT}", slow=False),
    Start("FLUX.2-dev", _FLUX2, f"{PIPEFUSION} {_SHORT}"),
    Start("FLUX.2-dev", _FLUX2, f"{ULYSSES} {EDIT} {_SHORT}"),
    Start(_KLEIN, _KLEIN, f"{RING} {EDIT} {_SHORT}"),
    Start("FLUX.2-dev", _FLUX2, f"--data_parallel_degree 2 --prompt red blue {_SHORT}"),
    Start("FLUX.1-Kontext-dev", _KONTEXT, f"{ULYSSES} {EDIT} {_SHORT}"),
    Start("FLUX.1-Kontext-dev", _KONTEXT, f"{RING} {EDIT} {_SHORT}"),
    # xDiT has no step cache for it.
    Start("Z-Image-Turbo", "Tongyi-MAI/Z-Image-Turbo", f"{ULYSSES} --prompt ring", slow=False),
    Start("Z-Image", "Tongyi-MAI/Z-Image", f"{CFG} --prompt ring"),
    Start("Z-Image", "Tongyi-MAI/Z-Image", f"{RING} --prompt ring"),
    Start("Lumina2", "Alpha-VLLM/Lumina-Image-2.0", f"{ULYSSES} --prompt ring"),
    Start("Lumina2", "Alpha-VLLM/Lumina-Image-2.0", f"{CFG} --prompt ring"),
    Start("Qwen-Image", "Qwen/Qwen-Image", ULYSSES),
    Start("Qwen-Image", "Qwen/Qwen-Image", f"{RING} --guidance_scale 4 --negative_prompt disc"),
    Start("Qwen-Image-Edit", "Qwen/Qwen-Image-Edit", f"{ULYSSES} {EDIT}"),
    Start("Qwen-Image-Edit", "Qwen/Qwen-Image-Edit", f"{CFG} {EDIT}"),
    Start("Krea-2-Raw", "krea/krea-2-raw", ULYSSES),
    Start("Krea-2-Turbo", "krea/krea-2-turbo", f"{ULYSSES} --num_inference_steps 8", steps=8),
    *(
        Start(
            "Ideogram-4", "ideogram-ai/ideogram-4-fp8", f"{layout} --height 256 --width 256",
            steps=steps, denoisers=models,
        )
        for layout, steps, models in ((ULYSSES, 2 * STEPS, 2), (CFG, STEPS, 1))
    ),
    Start(
        "Wan2.2-T2V", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", f"{ULYSSES} {_VIDEO}", denoisers=2,
        slow=False,
    ),
    Start("Wan2.1-T2V", "Wan-AI/Wan2.1-T2V-14B-Diffusers", f"{RING} {_VIDEO}"),
    Start("Wan2.1-I2V", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", f"{CFG} {EDIT} {_VIDEO}"),
    Start(
        "Wan2.2-I2V", "Wan-AI/Wan2.2-I2V-A14B-Diffusers", f"{CFG} {EDIT} {_VIDEO}", denoisers=2
    ),
    Start("Wan2.2-TI2V", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", f"{CFG} --task i2v {EDIT} {_VIDEO}"),
    Start("Wan2.2-TI2V", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", f"{ULYSSES} --task t2v {_VIDEO}"),
    Start(
        "Wan2.1-VACE-1.3B", "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        f"{ULYSSES} {EDIT} image.png {_VIDEO}",
    ),
    Start("HunyuanVideo", "tencent/HunyuanVideo", f"{ULYSSES} {_VIDEO}"),
    Start("Hunyuanvideo-1.5", _HUNYUAN15, f"{RING} --task t2v {_VIDEO}"),
    Start("LTX-2", "Lightricks/LTX-2", f"{ULYSSES} {_LTX2}", steps=STEPS + 3),
    Start("LTX-2.3", "dg845/LTX-2.3-Diffusers", f"{RING} {_LTX2}", steps=STEPS + 3),
    Start(
        "LTX-2.5", "Lightricks/LTX-2.5-Diffusers",
        f"{ULYSSES} --task t2v {_LTX2} --num_inference_steps 8", steps=8 + 3,
    ),
    Start("LTX-2.5-full", "Lightricks/LTX-2.5-Diffusers", f"{RING} --task t2v {_LTX2}"),
)  # fmt: skip


def test_every_family_that_the_runner_knows_and_the_cache_supports_is_started() -> None:
    of_toys = {"FLUX.1-dev", "SD3.5"}  # in `test_runner.py`
    started = {family_of(name).title for name in (*of_toys, *(start.name for start in STARTS))}
    assert started == {family.title for family in FAMILIES if family.adapter and family.names}


@pytest.mark.gloo
@pytest.mark.parametrize(
    "start",
    [
        pytest.param(s, marks=pytest.mark.slow if s.slow else (), id=f"{s.name} {s.flags}")
        for s in STARTS
    ],
)
def test_the_runner_draws_cached_with_every_denoiser(tmp_path: Path, start: Start) -> None:
    save(start.hub, tmp_path)
    picture(64).save(tmp_path / "image.png")
    out = tmp_path / "out"
    printed = launch(
        "runner_worker.py", 2, str(tmp_path), *CALL, "--model", start.name, *start.flags.split(),
        "--output_directory", str(out), timeout_s=280,
    )  # fmt: skip
    drawn = [*out.glob("*.png"), *out.glob("*.npy"), *out.glob("*.mp4")]
    assert len(drawn) == (2 if "data_parallel" in start.flags else 1), printed
    if drawn[0].suffix != ".png":
        frames = np.load(drawn[0]) if drawn[0].suffix == ".npy" else frames_of(drawn[0])
        assert frames.shape[-1] == 3 and np.isfinite(frames).all()
        assert len(frames) == (17 if "LTX" in start.name else FRAMES)
    else:
        assert Image.open(drawn[0]).size == ((256,) * 2 if "256" in start.flags else (SIDE, SIDE))
    reports = [json.loads(file.read_text()) for file in out.glob("cache_statistics*.json")]
    found = [one for one in reports if one["steps"]]
    assert len(found) == start.denoisers, printed
    assert sum(one["steps"] for one in found) == start.steps
    # Of a pipeline, the first stages do not call the scheduler.
    clock = "plan" if "pipefusion" in start.flags else "scheduler"
    for one in found:
        assert (one["use_cache"], one["collectives_per_step"]) == ("Fast", 1)
        assert 0 < one["block_approx_ratio"] < 1, printed
        assert one["clock"] == clock

"""`xdit-fastcache` on tiny Wan pipelines that lie where the names of xDiT's registry point."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schedule_worker
from PIL import Image
from support.tiny_models import tiny_wan, tiny_wan_vae
from support.worlds import ROOT, launch, run_world
from transformers import AutoTokenizer, T5EncoderModel

STEPS, FRAMES = 14, 9
CALL = (
    "--prompt", "ring", "--height", "32", "--width", "32", "--num_frames", str(FRAMES),
    "--num_inference_steps", str(STEPS), "--seed", "1", "--cache_method", "fastcache",
    "--cache_config", '{"cache_ratio_threshold":12.0}',
)  # fmt: skip
MODELS: dict[str, Any] = {
    "Wan2.1-T2V-14B-Diffusers": tiny_wan,
    "Wan2.2-T2V-A14B-Diffusers": partial(tiny_wan, experts=2),
    "Wan2.2-I2V-A14B-Diffusers": partial(tiny_wan, experts=2, in_channels=36),
    "Wan2.2-TI2V-5B-Diffusers": partial(tiny_wan, expand_timesteps=True),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    toy = ROOT / "toys" / "flux"
    text_encoder = T5EncoderModel.from_pretrained(toy / "text_encoder_2")
    tokenizer = AutoTokenizer.from_pretrained(toy / "tokenizer_2")
    for name, make in MODELS.items():
        pipe, _ = make(text_dim=text_encoder.config.d_model)
        pipe.register_modules(vae=tiny_wan_vae(), text_encoder=text_encoder, tokenizer=tokenizer)
        pipe.save_pretrained(folder / "Wan-AI" / name)
    Image.linear_gradient("L").convert("RGB").resize((32, 32)).save(folder / "image.png")
    return folder


SLOW = pytest.mark.slow


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("Wan2.2-T2V", "--ulysses_degree 2"),
        pytest.param("Wan2.1-T2V", "--ring_degree 2", marks=SLOW),
        pytest.param("Wan2.2-I2V", "--use_cfg_parallel", marks=SLOW),
        pytest.param("Wan2.2-TI2V", "--use_cfg_parallel --task i2v", marks=SLOW),
        pytest.param("Wan2.2-TI2V", "--ulysses_degree 2 --task t2v", marks=SLOW),
    ],
)
def test_the_runner_draws_cached_with_every_denoiser(
    hub: Path, tmp_path: Path, model: str, flags: str
) -> None:
    image = ("--input_images", "image.png") if "I2V" in model and "t2v" not in flags else ()
    printed = launch(
        "wan_runner.py", 2, str(hub), "--model", model, *flags.split(), *image, *CALL,
        "--output_directory", str(tmp_path), timeout_s=280,
    )  # fmt: skip
    (video,) = tmp_path.glob("*.npy")
    frames = np.load(video)
    assert frames.shape == (FRAMES, 32, 32, 3) and np.isfinite(frames).all()
    files = sorted(tmp_path.glob("cache_statistics*.json"))
    names = ["cache_statistics", "cache_statistics_transformer_2"]
    experts = 2 if model in ("Wan2.2-T2V", "Wan2.2-I2V") else 1
    assert [file.stem for file in files] == names[:experts], printed
    found = [json.loads(file.read_text()) for file in files]
    assert sum(one["steps"] for one in found) == STEPS
    for one in found:
        assert (one["use_cache"], one["collectives_per_step"]) == ("Fast", 1)
        assert 0 < one["block_approx_ratio"] < 1
        assert one["clock"] == "scheduler"


@pytest.mark.gloo
def test_schedules_of_attention_count_skipped_forward_passes() -> None:
    found = run_world("schedule_worker.py", 1)[0]["found"]
    computed = [bool(step) for step in 2 * schedule_worker.MASK for _ in ("cond", "uncond")]
    assert len(found["uncached"]) == len(computed)
    wanted = [name for name, runs in zip(found["uncached"], computed, strict=True) if runs]
    assert found["cached"] == wanted and len(set(wanted)) == 2

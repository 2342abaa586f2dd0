"""`xdit-fastcache` on tiny pictures' pipelines, which lie where xDiT's registry points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from PIL import Image
from support.worlds import ROOT, launch
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model, Qwen3Config, Qwen3Model

from diffusers_adapters.tiny import TINY_PIPELINES

STEPS = 14
CALL = (
    "--prompt", "ring", "--height", "64", "--width", "64", "--num_inference_steps", str(STEPS),
    "--seed", "1", "--cache_method", "fastcache",
    "--cache_config", '{"cache_ratio_threshold":12.0}',
)  # fmt: skip
MODELS = {
    "Qwen/Qwen-Image": "qwen",
    "Tongyi-MAI/Z-Image": "z-image",
    "Tongyi-MAI/Z-Image-Turbo": "z-image-turbo",
    "Alpha-VLLM/Lumina-Image-2.0": "lumina2",
}


def vae_of(model: str) -> Any:
    """Return a tiny VAE with 4 channels of latents for 8 x 8 pixels."""
    if model == "qwen":
        # Its first and last stage keep the size.
        return AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=1,
        scaling_factor=0.4,
        shift_factor=0.1,
    )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toys" / "flux" / "tokenizer_2")
    tokenizer.chat_template = "{{ messages[0].content }}"
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    small = text_encoder.config
    gemma = Gemma2Model(
        Gemma2Config(
            vocab_size=small.vocab_size,
            hidden_size=small.hidden_size,
            intermediate_size=small.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    for name, model in MODELS.items():
        pipe, _ = TINY_PIPELINES[model]()
        pipe.register_modules(
            vae=vae_of(model).eval(),
            text_encoder=gemma if model == "lumina2" else text_encoder,
            tokenizer=tokenizer,
        )
        pipe.save_pretrained(folder / name)
    return folder


SLOW = pytest.mark.slow


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        # xDiT has no step cache for it.
        ("Z-Image-Turbo", "--ulysses_degree 2"),
        pytest.param("Z-Image", "--use_cfg_parallel", marks=SLOW),
        pytest.param("Z-Image", "--ring_degree 2", marks=SLOW),
        pytest.param("Lumina2", "--ulysses_degree 2", marks=SLOW),
        pytest.param("Lumina2", "--use_cfg_parallel", marks=SLOW),
        pytest.param("Qwen-Image", "--ulysses_degree 2", marks=SLOW),
        pytest.param(
            "Qwen-Image", "--ring_degree 2 --guidance_scale 4 --negative_prompt disc", marks=SLOW
        ),
    ],
)
def test_the_runner_draws_cached(hub: Path, tmp_path: Path, model: str, flags: str) -> None:
    printed = launch(
        "wan_runner.py", 2, str(hub), "--model", model, *flags.split(), *CALL,
        "--output_directory", str(tmp_path), timeout_s=280,
    )  # fmt: skip
    (picture,) = tmp_path.glob("*.png")
    assert Image.open(picture).size == (64, 64)
    found = json.loads((tmp_path / "cache_statistics.json").read_text())
    assert (found["use_cache"], found["steps"], found["collectives_per_step"]) == ("Fast", STEPS, 1)
    assert 0 < found["block_approx_ratio"] < 1, printed
    assert found["clock"] == "scheduler"

"""xDiT's runner on tiny HunyuanVideo pipelines; CogVideoX and ConsisID loaded by xfuser."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from support.films import frames_of
from support.worlds import ROOT, launch, run_world
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
)

from diffusers_adapters.tiny import TINY_PIPELINES
from diffusers_adapters.tiny.hunyuan_video import tiny_hunyuan_video, tiny_hunyuan_video15

STEPS, FRAMES, SIDE = 14, 9, 32
# Pipelines of HunyuanVideo leave the first words out, which are those of their templates.
CALL = (
    "--prompt", "ring " * 120, "--height", str(SIDE), "--width", str(SIDE),
    "--num_frames", str(FRAMES), "--num_inference_steps", str(STEPS), "--seed", "1",
    "--cache_method", "fastcache", "--cache_config", '{"cache_ratio_threshold":12.0}',
)  # fmt: skip
_WIDE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def _tokenizer() -> Any:
    """Return the toys': a token a word."""
    found = AutoTokenizer.from_pretrained(ROOT / "toys" / "flux" / "tokenizer_2")
    found.chat_template = (
        "{{ 'ring ' * 120 }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    return found


def _hunyuan_video() -> Any:
    pipe, _ = tiny_hunyuan_video()
    torch.manual_seed(0)
    pipe.register_modules(
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        text_encoder=LlamaModel(LlamaConfig(num_key_value_heads=2, **_WIDE)),
        text_encoder_2=CLIPTextModel(
            CLIPTextConfig(**{**_WIDE, "hidden_size": 8}, max_position_embeddings=77)
        ),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
    )
    return pipe


def _hunyuan_video15() -> Any:
    pipe, _ = tiny_hunyuan_video15()
    torch.manual_seed(0)
    rope = {"type": "default", "mrope_section": [1, 1, 2]}
    pipe.register_modules(
        text_encoder=Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(num_key_value_heads=2, rope_scaling=rope, **_WIDE)
        ),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=512, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
        ),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
    )
    return pipe


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize(
    ("model", "make", "folder", "flags"),
    [
        ("HunyuanVideo", _hunyuan_video, "tencent/HunyuanVideo", "--ulysses_degree 2"),
        (
            "Hunyuanvideo-1.5",
            _hunyuan_video15,
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
            "--ring_degree 2 --task t2v",
        ),
    ],
)
def test_the_runner_draws_cached(
    tmp_path: Path, model: str, make: Any, folder: str, flags: str
) -> None:
    make().save_pretrained(tmp_path / "hub" / folder)
    printed = launch(
        "wan_runner.py", 2, str(tmp_path / "hub"), "--model", model, *flags.split(), *CALL,
        "--output_directory", str(tmp_path / "out"), timeout_s=280,
    )  # fmt: skip
    (video,) = (tmp_path / "out").glob("*.mp4")
    frames = frames_of(video)
    assert frames.shape == (FRAMES, SIDE, SIDE, 3) and frames.std() > 0
    found = json.loads((tmp_path / "out" / "cache_statistics.json").read_text())
    assert (found["use_cache"], found["steps"]) == ("Fast", STEPS), printed
    assert (found["collectives_per_step"], found["clock"]) == (1, "scheduler")
    assert 0 < found["block_approx_ratio"] < 1


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("name", ["CogVideoX", "ConsisID"])
def test_xfusers_pipeline_takes_cache_args(tmp_path: Path, name: str) -> None:
    """In `from_pretrained`, and so in the constructor that it calls.

    diffusers has ConsisID's class only beside OpenCV, which nothing here calls.
    """
    pipe, _ = TINY_PIPELINES[name.lower()]()
    pipe.save_pretrained(tmp_path / name)
    script = tmp_path / "load.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
            import diffusers
            from diffusers_adapters.tiny import TINY_PIPELINES
            from support.films import frames_of
from support.worlds import report
            from xfuser_fastcache import get_cache_statistics
            from xfuser_fastcache.xdit import cpu_platform
            tiny, call = TINY_PIPELINES[{name.lower()!r}]()
            setattr(diffusers, type(tiny).__name__, type(tiny))
            cpu_platform.enable_cpu_platform()
            import torch.distributed as dist
            from xfuser import xFuserArgs, xFuser{name}Pipeline
            engine_config, _ = xFuserArgs(height=64, width=64, ulysses_degree=2).create_config()
            pipe = xFuser{name}Pipeline.from_pretrained(
                {str(tmp_path / name)!r},
                engine_config=engine_config,
                cache_args={{"use_cache": "Fast", "cache_ratio_threshold": 12.0}},
                **dict.fromkeys(("text_encoder", "tokenizer")),
                vae=tiny.vae,
            )
            pipe.set_progress_bar_config(disable=True)
            pipe(**{{**call, "num_inference_steps": 8}})
            found = get_cache_statistics(pipe.transformer)
            report(dist.get_rank(), found=[found["steps"], found["block_approx_ratio"] > 0])
            cpu_platform.finish()
            """
        )
    )
    assert [rank["found"] for rank in run_world(script, 2).values()] == [[8, True]] * 2


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("model", ["cogvideox", "consisid"])
def test_a_model_is_refused_under_pipefusion(tmp_path: Path, model: str) -> None:
    """xDiT draws something wrong there, and says nothing."""
    script = tmp_path / "refused.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
            from support.matrix import build
            from support.films import frames_of
from support.worlds import report
            from xfuser_fastcache import apply_cache_on_transformer
            from xfuser_fastcache.xdit import cpu_platform
            cpu_platform.enable_cpu_platform()
            import torch.distributed as dist
            pipe, _ = build({model!r}, 1, pipefusion_parallel_degree=2)
            try:
                apply_cache_on_transformer(pipe.transformer)
            except ValueError as error:
                report(dist.get_rank(), found=str(error))
            cpu_platform.finish()
            """
        )
    )
    for rank in run_world(script, 2).values():
        assert "under PipeFusion: in xDiT its stages hand nothing on" in rank["found"]

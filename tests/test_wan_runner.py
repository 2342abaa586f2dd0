"""`xdit-fastcache` on tiny Wan pipelines that lie where the names of xDiT's registry point."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import schedule_worker
from PIL import Image
from support.films import frames_of
from support.served import Served
from support.worlds import ROOT, launch, python, run_world
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5EncoderModel,
)

from diffusers_adapters.tiny.wan import (
    tiny_wan,
    tiny_wan22_i2v,
    tiny_wan_i2v,
    tiny_wan_vae,
)
from xfuser_fastcache.xdit.runner_classes import refuse

STEPS, FRAMES = 14, 9
CALL = (
    "--prompt", "ring", "--height", "32", "--width", "32", "--num_frames", str(FRAMES),
    "--num_inference_steps", str(STEPS), "--seed", "1", "--cache_method", "fastcache",
    "--cache_config", '{"cache_ratio_threshold":12.0}',
)  # fmt: skip
MODELS: dict[str, Any] = {
    "Wan2.1-T2V-14B-Diffusers": tiny_wan,
    "Wan2.1-I2V-14B-720P-Diffusers": tiny_wan_i2v,
    "Wan2.2-T2V-A14B-Diffusers": partial(tiny_wan, experts=2),
    "Wan2.2-I2V-A14B-Diffusers": tiny_wan22_i2v,
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
        if pipe.transformer.config.image_dim:
            pipe.register_modules(
                image_encoder=CLIPVisionModel(
                    CLIPVisionConfig(
                        hidden_size=pipe.transformer.config.image_dim,
                        intermediate_size=8,
                        num_hidden_layers=2,
                        num_attention_heads=1,
                        image_size=32,
                        patch_size=16,
                    )
                ),
                image_processor=CLIPImageProcessor(
                    size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
                ),
            )
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
        pytest.param("Wan2.1-I2V", "--ulysses_degree 2", marks=SLOW),
        pytest.param("Wan2.1-I2V", "--use_cfg_parallel", marks=SLOW),
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
    (video,) = tmp_path.glob("*.mp4")
    frames = frames_of(video)
    assert frames.shape == (FRAMES, 32, 32, 3) and frames.std() > 0
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


@pytest.mark.gloo
def test_a_pipeline_is_put_in_a_layout_with_the_runners_classes_or_refused(tmp_path: Path) -> None:
    """As `fastcache generate` does; weights are taken over, and the video stays the same."""
    script = tmp_path / "layout.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
            import torch
            from diffusers_adapters.tiny.wan import tiny_wan
            from support.worlds import report
            from xfuser_fastcache.xdit import cpu_platform
            cpu_platform.enable_cpu_platform()
            from xfuser_fastcache.xdit.loaded import put_in_layout
            import torch.distributed as dist
            pipe, call = tiny_wan(experts=2)
            pipe.set_progress_bar_config(disable=True)
            def draw():
                return pipe(**{{**call, "generator": torch.Generator().manual_seed(1)}}).frames
            alone, weight = draw(), pipe.transformer.proj_out.weight.data_ptr()
            assert put_in_layout(pipe, ulysses_degree=2) is pipe
            kept = pipe.transformer.proj_out.weight.data_ptr() == weight
            classes = [type(t).__name__ for t in (pipe.transformer, pipe.transformer_2)]
            close = torch.allclose(draw(), alone, rtol=1e-4, atol=1e-4)
            report(dist.get_rank(), classes=classes, close=close, kept=kept)
            cpu_platform.finish()
            """
        )
    )
    for found in run_world(script, 2).values():
        assert found["classes"] == ["xFuserWanTransformer3DWrapper"] * 2
        assert found["close"] and found["kept"]
    parallel = SimpleNamespace(pp_degree=1, cfg_degree=2, ring_degree=1)
    with pytest.raises(ValueError, match="WanPipeline does not support use_cfg_parallel in xDiT"):
        refuse(tiny_wan()[0], parallel)
    refuse(tiny_wan_i2v()[0], parallel)
    parallel.pp_degree = 2
    with pytest.raises(ValueError, match="does not support pipefusion_parallel_degree"):
        refuse(tiny_wan_i2v()[0], parallel)


@pytest.mark.gloo
def test_both_experts_are_drawn_cached_and_reported_by_generate(hub: Path, tmp_path: Path) -> None:
    model = hub / "Wan-AI" / "Wan2.2-T2V-A14B-Diffusers"
    done = python(
        "-m", "xfuser_fastcache.cli", "generate", "--model", model,
        "--prompt", "ring", "--height", "32", "--width", "32", "--num_frames", "5",
        "--num_inference_steps", "8", "--use_cache", "Fast", "--baseline", "--cache_config",
        '{"cache_ratio_threshold": 12.0}', "--output_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    both = (report["statistics"], report["statistics_transformer_2"])
    assert sum(one["steps"] for one in both) == 8
    assert all(0 < one["block_approx_ratio"] < 1 for one in both)
    assert report["decisions_digest"]["0"].split() == [one["decisions_digest"] for one in both]
    assert "hit ratio_transformer_2" in done.stdout
    with Image.open(tmp_path / "cached_0.webp") as moving:
        assert (moving.n_frames, moving.size) == (5, (32, 32))
    assert frames_of(tmp_path / "comparison_0.mp4").shape == (5, 32, 96, 3)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("Wan2.2-TI2V-5B-Diffusers", "--ulysses_degree 2"),
        pytest.param("Wan2.1-I2V-14B-720P-Diffusers", "--use_cfg_parallel", marks=SLOW),
    ],
)
def test_a_video_begins_with_a_picture(hub: Path, tmp_path: Path, model: str, flags: str) -> None:
    """TI2V's folder names the pipeline for text alone; with --image the other one of its two."""
    launch(
        "../scripts/generate.py", 2, "--model", str(hub / "Wan-AI" / model), "--prompt", "ring",
        "--image", str(hub / "image.png"), "--fps", "16", "--height", "32", "--width", "32",
        "--num_frames", "5", "--num_inference_steps", "8", "--use_cache", "Fast", "--baseline",
        "--cache_config", '{"computed_steps": 4}', "--output_dir", str(tmp_path), *flags.split(),
        timeout_s=280,
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["statistics"]["block_approx_ratio"] == 0.5
    assert len(set(report["decisions_digest"].values())) == report["collectives_per_step"] == 1
    assert 20 < report["psnr_db"] < 90
    assert frames_of(tmp_path / "cached_0.mp4").shape == (5, 32, 32, 3)


@pytest.mark.gloo
def test_a_service_answers_with_a_moving_picture(hub: Path) -> None:
    service = Served(
        1, "--model", str(hub / "Wan-AI" / "Wan2.1-T2V-14B-Diffusers"), "--height", "32", "--width",
        "32", "--num_frames", "5", "--num_inference_steps", "6", "--use_cache", "Fast",
        "--fps", "12.5",
        "--cache_config", '{"cache_ratio_threshold": 12.0}',
    )  # fmt: skip
    try:
        body = {"prompt": "ring", "seed": 3}
        answer = service.client.post("/generate", json=body).json()
        other = service.client.post("/generate", json=body).json()
        png = service.client.post("/generate", json={**body, "output_format": "png"}).json()
        mp4 = {"Accept": "video/mp4"}
        films = [service.client.post("/generate", json=body, headers=mp4) for _ in range(2)]
        wrong = service.client.post("/generate", json={**body, "output_format": "png"}, headers=mp4)
        openai = {**body, "output_format": "mp4"}
        openai = service.client.post("/v1/images/generations", json=openai).json()
        limits = service.client.get("/health").json()["limits"]
    finally:
        service.end()
    assert answer["image"] == other["image"] and 0 < answer["statistics"]["block_approx_ratio"] < 1
    assert (answer["output_format"], limits["formats"]) == ("webp", ["webp", "png", "mp4"])
    frames = []
    for found, form in ((answer, "WEBP"), (png, "PNG")):
        with Image.open(io.BytesIO(base64.b64decode(found["image"]))) as moving:
            assert (moving.format, moving.n_frames, moving.size) == (form, 5, (32, 32))
            moving.seek(4)
            frames.append(moving.convert("RGB").tobytes())
            assert moving.info["duration"] == 80
    assert frames[0] == frames[1]
    assert [film.headers["content-type"] for film in films] == ["video/mp4"] * 2
    assert films[0].content == films[1].content and films[0].headers["x-seed"] == "3"
    assert frames_of(films[0].content).shape == (5, 32, 32, 3)
    assert base64.b64decode(openai["data"][0]["b64_json"]) == films[0].content
    assert (openai["output_format"], wrong.status_code) == ("mp4", 422)
    assert "output_format='png' and Accept: video/mp4 contradict" in wrong.json()["detail"]

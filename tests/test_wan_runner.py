"""Wan with xDiT's classes: its schedules of attention, layouts, `fastcache generate`, a service."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import schedule_worker
from PIL import Image
from support.films import frames_of
from support.hub import save
from support.served import Served
from support.worlds import ROOT, launch, python, run_world

from diffusers_adapters.tiny.model import picture
from diffusers_adapters.tiny.wan import tiny_wan, tiny_wan_i2v
from xfuser_fastcache.xdit.runner_classes import refuse


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
def test_both_experts_are_drawn_cached_and_reported_by_generate(tmp_path: Path) -> None:
    model = save("Wan-AI/Wan2.2-T2V-A14B-Diffusers", tmp_path)
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
        pytest.param("Wan2.1-I2V-14B-720P-Diffusers", "--use_cfg_parallel", marks=pytest.mark.slow),
    ],
)
def test_a_video_begins_with_a_picture(tmp_path: Path, model: str, flags: str) -> None:
    """TI2V's folder names the pipeline for text alone; with --image the other one of its two."""
    folder = save(f"Wan-AI/{model}", tmp_path)
    picture(32).save(tmp_path / "image.png")
    launch(
        "../scripts/generate.py", 2, "--model", str(folder), "--prompt", "ring",
        "--image", str(tmp_path / "image.png"), "--fps", "16", "--height", "32", "--width", "32",
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
def test_a_service_answers_with_a_moving_picture(tmp_path: Path) -> None:
    model = save("Wan-AI/Wan2.1-T2V-14B-Diffusers", tmp_path)
    service = Served(
        1, "--model", str(model), "--height", "32", "--width",
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

"""`fastcache generate` as a user runs it: flags, errors, report, and the demo's promise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.worlds import ROOT, launch

CONFIG = str(ROOT / "configs" / "toy_flux_fast.yaml")
ENDINGS = ("webp", "mp4")  # PyAV comes with xfuser
REPORT_KEYS = {
    "model", "world_size", "parallel", "num_inference_steps", "use_cache", "latency_s", "speedup",
    "psnr_db", "ssim", "statistics", "decisions_digest", "collectives_per_step",
    "peak_memory_bytes", "environment",
}  # fmt: skip


@pytest.fixture(scope="module")
def generate() -> Any:
    """The command's module; xfuser is imported on the way."""
    from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform

    enable_cpu_platform()
    from xfuser_fastcache.cli import generate

    return generate


def configured(generate: Any, *flags: str) -> Any:
    return generate.cache_config(generate.options_from(["--config", CONFIG, *flags]))


def test_the_command_line_wins_over_the_config_file(generate: Any) -> None:
    options = generate.options_from(["--config", CONFIG, "--seed", "7", "--ulysses_degree", "2"])
    assert (options.seed, options.ulysses_degree) == (7, 2)
    assert (options.height, options.num_inference_steps) == (128, 28)
    assert options.model == "toys/flux"


def test_three_ways_to_ask_for_fast_mean_the_same(generate: Any) -> None:
    plain = ["--model", "m", "--prompt", "p", "--cache_config", '{"cache_ratio_threshold": 0.2}']
    named, method = (
        generate.cache_config(generate.options_from([*plain, *flags]))
        for flags in (["--use_cache", "Fast"], ["--cache_method", "fastcache"])
    )
    assert named == method
    assert named.cache_ratio_threshold == 0.2


def test_a_bare_use_cache_keeps_its_meaning(generate: Any) -> None:
    options = generate.options_from(["--model", "m", "--prompt", "p", "--use_cache"])
    assert options.use_cache is True
    assert generate.cache_config(options) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_config", "{"], "not valid JSON"),
        (["--cache_config", '{"treshold": 1}'], "unknown cache option 'treshold'"),
        (["--cache_config", '{"cache_ratio_threshold": "x"}'], "cache_ratio_threshold='x'"),
        (["--use_cache", "Slow"], "unknown cache backend 'Slow'; known: Fast"),
        (["--cache_method", "teacache"], "xDiT's own cache"),
    ],
)
def test_wrong_cache_flags_say_what_is_wrong(generate: Any, flags: list[str], message: str) -> None:
    from xfuser_fastcache.backends import gate_of

    with pytest.raises((ValueError, TypeError), match=message.replace("'", ".")):
        gate_of(configured(generate, *flags))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML or JSON"),
        ("- a\n- b\n", "must hold a mapping"),
        ("model: x\nheigth: 3\n", "'heigth' is no flag"),
    ],
)
def test_a_config_file_that_is_wrong_is_named(
    generate: Any, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        generate.options_from(["--config", str(path)])
    assert "wrong.yaml" in str(raised.value)


@pytest.mark.parametrize("missing", ["--model", "--prompt"])
def test_what_is_missing_is_named(
    generate: Any, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    given = {"--model": "m", "--prompt": "p"}
    del given[missing]
    with pytest.raises(SystemExit):
        generate.options_from([part for pair in given.items() for part in pair])
    assert f"{missing} is needed" in capsys.readouterr().err


def check_decisions(directory: Path, steps: int, spans: int) -> None:
    """Check that the written decisions are those that the report counts."""
    counted = json.loads((directory / "report.json").read_text())["statistics"]["blocks"]
    names = list(counted)
    trace = [json.loads(line) for line in (directory / "trace.jsonl").read_text().splitlines()]
    assert len(trace) == steps * spans
    assert {(e["step"], e["span"]) for e in trace} == {
        (step, span) for step in range(steps) for span in range(spans)
    }
    found = {decision: Counter({name: 0 for name in names}) for decision in ("skipped", "computed")}
    for entry in trace:
        first, last = names.index(entry["first_block"]), names.index(entry["last_block"])
        outcome = "skipped" if entry["decision"] == "skipped" else "computed"
        found[outcome].update(names[first : last + 1])
    for outcome, blocks in found.items():
        assert blocks == {name: row[outcome] for name, row in counted.items()}
        assert any(blocks.values()), outcome


@pytest.mark.gloo
def test_the_demo_keeps_its_promise(tmp_path: Path) -> None:
    """What scripts/demo.sh runs: 2 ranks, 28 steps, 40 dB, 1.5 times as fast or more."""
    from PIL import Image

    printed = launch(
        "../scripts/generate.py", 2, "--config", CONFIG, "--ulysses_degree", "2", "--baseline",
        "--repeat", "2", "--output_dir", str(tmp_path),
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= REPORT_KEYS
    assert report["world_size"] == 2
    assert report["parallel"] == {"ulysses": 2, "ring": 1, "pipefusion": 1, "cfg": 1, "data": 1}
    assert report["use_cache"] == "Fast"
    assert report["psnr_db"] >= 40
    assert report["speedup"] >= 1.5
    assert report["latency_s"]["baseline"] / report["latency_s"]["cached"] == report["speedup"]
    assert report["collectives_per_step"] == 1
    assert sorted(report["decisions_digest"]) == ["0", "1"]
    assert len(set(report["decisions_digest"].values())) == 1
    check_decisions(tmp_path, steps=28, spans=1)
    for name in ("baseline", "cached", "comparison", "heatmap"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) >= 128
    for word in (
        "speedup", "PSNR", "SSIM", "hit ratio", "collectives per step", "consensus wait",
        "blocks.0 ... ", report["statistics"]["decisions_digest"][:12],
        f"decisions in {tmp_path}/trace.jsonl and {tmp_path}/heatmap.png",
    ):  # fmt: skip
        assert word in printed, word


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("flags", "prompts", "pictures"),
    [
        pytest.param([], 4, 4, marks=pytest.mark.slow),
        (["--prompt", "a large red ring"], 1, 2),
    ],
)
def test_replicas_write_their_own_pictures(
    tmp_path: Path, flags: list[str], prompts: int, pictures: int
) -> None:
    launch(
        "../scripts/generate.py", 2, "--config", CONFIG, "--data_parallel_degree", "2",
        "--num_inference_steps", "6", "--output_dir", str(tmp_path), "--baseline",
        "--cache_config", '{"cache_ratio_threshold": 0.5, "granularity": 3}', *flags,
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["prompts"]) == prompts
    assert len(list(tmp_path.glob("cached_*.png"))) == pictures
    assert report["parallel"]["data"] == 2
    check_decisions(tmp_path, steps=6, spans=3)


@pytest.mark.slow
@pytest.mark.gloo
def test_being_there_costs_little() -> None:
    """The never-skip ratio of scripts/overhead.py is not shown to be above 1.05.

    Idle cores print 1.02 to 1.03; the limit leaves room for slower and shared ones.
    """
    command = [
        sys.executable, str(ROOT / "scripts" / "overhead.py"), "--config", CONFIG,
        "--pairs", "30", "--prompt", "a large red ring, top left, on dark blue",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("never-skip ratio"))
    lower = float(line.split("interval ")[1].split()[0])
    assert lower <= 1.05, line


def test_clips_become_moving_pictures(generate: Any, tmp_path: Path) -> None:
    """What a video pipeline returns is written as clips, beside what a cache made of it."""
    from xfuser_fastcache.reports.clips import drawn_by

    frames = np.random.default_rng(0).uniform(size=(1, 9, 16, 20, 3))
    (clip,) = drawn_by(SimpleNamespace(frames=frames))
    generate.save_pictures("cached", [clip], tmp_path, fps=12.5)
    generate.save_comparison([clip], [0.9 * clip], ["a ring that moves"], tmp_path, fps=12.5)
    films = {f"{kind}_0.{ending}" for kind in ("cached", "comparison") for ending in ENDINGS}
    names = {"comparison_0.png", *films}
    assert {path.name for path in tmp_path.iterdir()} == names
    with Image.open(tmp_path / "cached_0.webp") as moving:
        assert (moving.n_frames, moving.size) == (9, (20, 16))
    with Image.open(tmp_path / "comparison_0.webp") as moving:
        moving.load()
        assert (moving.n_frames, moving.size, moving.info["duration"]) == (9, (60, 16), 80)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fps", "0"], "--fps 0: give more than 0 frames a second"),
        (["--image", "nowhere.png"], "--image nowhere.png: there is no such file"),
    ],
)
def test_wrong_flags_of_clips_are_refused(
    generate: Any, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        generate.options_from(["--config", CONFIG, *flags])
    assert message in capsys.readouterr().err


def test_a_picture_goes_to_pipelines_that_take_one_and_to_no_others(
    generate: Any, tmp_path: Path
) -> None:
    from diffusers import FluxPipeline, WanImageToVideoPipeline

    from xfuser_fastcache.xdit import generator

    def call(kind: type, *flags: str) -> dict[str, Any]:
        options = generate.options_from(["--config", CONFIG, *flags])
        return generator._call_of(object.__new__(kind), options)

    path = tmp_path / "first.png"
    Image.new("L", (3, 2), 7).save(path)
    found = call(WanImageToVideoPipeline, "--image", str(path))["image"]
    assert (found.mode, found.size, found.getpixel((0, 0))) == ("RGB", (3, 2), (7, 7, 7))
    assert "image" not in call(FluxPipeline)
    with pytest.raises(ValueError, match="FluxPipeline takes no --image; leave it out"):
        call(FluxPipeline, "--image", str(path))
    with pytest.raises(ValueError, match="WanImageToVideoPipeline begins with a picture: give --i"):
        call(WanImageToVideoPipeline)
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"--image .*first.png is no picture that can be read"):
        call(WanImageToVideoPipeline, "--image", str(path))

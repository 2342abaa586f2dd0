"""Every registered model in every layout, uncached and cached: the embedded toys of a checkout."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from xfuser_fastcache.benchmarks.pipelining import pipeline_allows
from xfuser_fastcache.benchmarks.processes import QUIET, spawn
from xfuser_fastcache.benchmarks.quality import drawn_by_toys
from xfuser_fastcache.calibration.checkout import ROOT
from xfuser_fastcache.calibration.prompts import AUDIT, prompts_for
from xfuser_fastcache.plugins import ADAPTERS, loaded

PIPEFUSION = "--pipefusion_parallel_degree"
ULYSSES = "--ulysses_degree=2"
CFG = "--use_cfg_parallel"
ONE_RANK = "1 rank"
# Layout -> ranks, flags of xDiT.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    ONE_RANK: (1, ()),
    "ulysses 2": (2, (ULYSSES,)),
    "ring 2": (2, ("--ring_degree=2",)),
    "pipefusion 2": (2, (f"{PIPEFUSION}=2",)),
    "cfg 2": (2, (CFG,)),
    "data 2": (2, ("--data_parallel_degree=2",)),
    "pipefusion 2 x ulysses 2": (4, (f"{PIPEFUSION}=2", ULYSSES)),
    "cfg 2 x pipefusion 2": (4, (CFG, f"{PIPEFUSION}=2")),
    "cfg 2 x ulysses 2": (4, (CFG, ULYSSES)),
    "pipefusion 4": (4, (f"{PIPEFUSION}=4",)),
}


@dataclass(frozen=True)
class Exclusion:
    """What xDiT cannot do uncached.

    Attributes:
        model: name of the adapter.
        flag: of the layouts that are left out.
        reason: in a sentence.
        error: what xDiT itself says; None where it says nothing and draws something else.
    """

    model: str
    flag: str
    reason: str
    error: str | None

    @property
    def sentence(self) -> str:
        """Say what xDiT cannot do, and what it says."""
        says = f"says `{self.error}`" if self.error else "says nothing, and draws something else"
        return f"{self.reason}. xDiT {says}."


_NO_PIPELINE = "xDiT's transformer for it is no pipeline"
_ALONE_I2V = "xDiT gives CFG parallelism to Wan's image-to-video pipeline alone"
_SEQUENCE_ALONE = "xDiT's runner has Ulysses and ring attention alone for it"
EXCLUDED = (
    Exclusion(
        "flux",
        CFG,
        "FLUX.1 is distilled: its pipeline makes one call a step and has no second branch",
        "CFG parallelism is not supported by the model",
    ),
    Exclusion(
        "flux2",
        CFG,
        "dev makes one call a step, and klein's two are not shared out: xDiT's runner refuses it",
        "does not support use_cfg_parallel",
    ),
    *(
        Exclusion(model, flag, reason, f"does not support {flag.strip('-').split('=')[0]}")
        for model, flag, reason in (
            ("wan", f"{PIPEFUSION}=2", _NO_PIPELINE),
            ("wan", CFG, _ALONE_I2V),
            ("wan_vace", f"{PIPEFUSION}=2", _NO_PIPELINE),
            ("wan_vace", CFG, _ALONE_I2V),
            ("qwen_image", f"{PIPEFUSION}=2", _NO_PIPELINE),
            ("qwen_image", CFG, "xDiT gives CFG parallelism to Qwen-Image-Edit alone"),
            ("z_image", f"{PIPEFUSION}=2", _NO_PIPELINE),
            ("krea2", f"{PIPEFUSION}=2", _NO_PIPELINE),
            ("krea2", CFG, "its two branches are not shared out: xDiT's runner refuses it"),
            ("krea2", "--ring_degree=2", "xDiT's runner does not offer it"),
            ("hunyuan_video", f"{PIPEFUSION}=2", _NO_PIPELINE),
            ("hunyuan_video", CFG, _SEQUENCE_ALONE),
            ("hunyuan_video15", f"{PIPEFUSION}=2", _NO_PIPELINE),
            ("hunyuan_video15", CFG, _SEQUENCE_ALONE),
            ("ideogram4", f"{PIPEFUSION}=2", _NO_PIPELINE),
            ("ltx2", f"{PIPEFUSION}=2", _NO_PIPELINE),
            ("ltx2", CFG, _SEQUENCE_ALONE),
        )
    ),
    *(
        Exclusion(
            "sana",
            flag,
            "without flash-attn, its linear attention names a kernel that yunchang does not have",
            "AttributeError: TORCH",
        )
        for flag in (ULYSSES, "--ring_degree=2")
    ),
    Exclusion(
        "sana",
        f"{PIPEFUSION}=2",
        "a rank sends rows of its convolutions to itself, which gloo does not do",
        "Pair is not connected",
    ),
    Exclusion(
        "lumina2",
        f"{PIPEFUSION}=2",
        _NO_PIPELINE,
        "Pipefusion parallelism is not supported by the model",
    ),
    Exclusion(
        "lumina2",
        "--ring_degree=2",
        "ring attention would need a mask a step for its texts",
        "Lumina2 sequence parallelism currently supports Ulysses only",
    ),
    *(
        Exclusion("latte", flag, "blocks over frames attend to tokens of other places", None)
        for flag in (ULYSSES, "--ring_degree=2", f"{PIPEFUSION}=2")
    ),
    *(
        Exclusion(
            model,
            f"{PIPEFUSION}=2",
            "each stage runs its own blocks on the latents, and hands nothing on",
            None,
        )
        for model in ("cogvideox", "consisid")
    ),
)

# What a cell has to reach.
PSNR_DB = 35.0
GAIN_KEPT = 0.9
ACCURACY_POINTS = 2.0


def cells() -> list[tuple[str, str]]:
    """Return every (model with a toy, layout) that xDiT runs uncached."""
    return [
        (model, layout)
        for model in loaded(ADAPTERS)
        for layout in LAYOUTS
        if Path(toy_of(model)).exists() and not is_excluded(model, layout)
    ]


def is_excluded(model: str, layout: str) -> bool:
    """Say whether xDiT cannot run a model in a layout."""
    flags = {flag.split("=")[0] for flag in LAYOUTS[layout][1]}
    return any(e.model == model and e.flag.split("=")[0] in flags for e in EXCLUDED)


def toy_of(model: str) -> str:
    """Return the folder of an adapter's embedded toy."""
    return str(ROOT / "toys" / model)


def pictures_of(model: str, sequences: int) -> int:
    """Return how many pictures make so many sequences of tokens a step; with guidance half."""
    guided = not any((model, CFG) == (e.model, e.flag) for e in EXCLUDED)
    return sequences // 2 if guided else sequences


def command(model: str, layout: str, *flags: str) -> list[str]:
    """Return the command of a cell, from torchrun's flags on."""
    ranks, of_layout = LAYOUTS[layout]
    config = f"configs/toy_{model}_fast.yaml"
    if not (ROOT / config).exists():
        raise FileNotFoundError(
            f"the adapter {model!r} is registered but {config} does not exist; add it and a toy "
            "pipeline, see toys/README.md"
        )
    return [
        f"--nproc_per_node={ranks}", "scripts/generate.py", f"--config={config}", *of_layout,
        "--baseline", *flags,
    ]  # fmt: skip


def launch(arguments: list[str], limit_s: float) -> str:
    """Run torchrun with one thread a rank; return its output.

    Raises:
        RuntimeError: it failed, or ran past `limit_s` seconds; with the end of its output.
    """
    full = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **QUIET}
    with spawn(full, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
            raise RuntimeError(f"ended after {limit_s} s\n{output[-3000:]}") from None
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}\n{output[-3000:]}")
    return output


def run_cell(model: str, layout: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one cell and return its report."""
    directory = Path(options.output_dir) / model / layout.replace(" ", "_")
    pictures = pictures_of(model, options.sequences)
    captions = prompts_for(toy_of(model), AUDIT, pictures, seed=0)
    flags = (f"--repeat={options.repeat}", f"--output_dir={directory}", "--prompt", *captions)
    launch(command(model, layout, *flags), options.limit_s)
    report = json.loads((ROOT / directory / "report.json").read_text())
    stages = report["parallel"]["pipefusion"]
    report["pipeline_allows"] = None
    if stages > 1:
        lines = (ROOT / directory / "trace.jsonl").read_text().splitlines()
        decisions = [json.loads(line)["decision"] == "skipped" for line in lines]
        config = report["cache_config"]
        how = config["stagger_stages"], config["computed_steps"] is not None
        report["pipeline_allows"] = pipeline_allows(decisions, stages, stages, *how)
    return report


def run_captions(model: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the share of unseen captions that pictures pass, in percent: baseline and cached."""
    captions = prompts_for(toy_of(model), AUDIT, options.captions, seed=0)
    drawn = drawn_by_toys(captions)
    assert drawn is not None, "a cell has run"
    directory = Path(options.output_dir) / model / "captions"
    flags = (f"--output_dir={directory}", "--prompt", *captions)
    launch(command(model, ONE_RANK, *flags), options.limit_s)
    passed = {}
    for kind in ("baseline", "cached"):
        items = [_saved(ROOT / directory / f"{kind}_{i}.png") for i in range(options.captions)]
        results = [drawn.check(x, c).passed for x, c in zip(items, drawn.captions, strict=True)]
        passed[kind] = 100.0 * sum(results) / options.captions
    report = json.loads((ROOT / directory / "report.json").read_text())
    return passed | {
        "psnr_db": report["psnr_db"],
        "hits": report["statistics"]["block_approx_ratio"],
    }


def _saved(picture: Path) -> np.ndarray:
    """Return a picture that was saved, or where there is none, the frames of the clip beside it."""
    if picture.exists():
        return np.array(Image.open(picture))
    frames = ImageSequence.Iterator(Image.open(picture.with_suffix(".webp")))
    return np.stack([np.array(frame.convert("RGB")) for frame in frames])


def shortfalls(model: str, layout: str, report: dict[str, Any], gain_kept: float) -> list[str]:
    """Say what a cell promises and does not hold."""
    found = []
    if not report["identical"] and report["psnr_db"] < PSNR_DB:
        found.append(f"PSNR {report['psnr_db']:.1f} dB is below {PSNR_DB:.0f} dB")
    if report["statistics"]["block_approx_ratio"] == 0:
        found.append("nothing was skipped")
    if report["collectives_per_step"] != 1:
        found.append(f"{report['collectives_per_step']} collectives a step")
    if len(set(report["decisions_digest"].values())) > report["parallel"]["data"]:
        found.append("ranks of one decision group decided differently")
    if report["world_size"] == 2 and gain_kept < GAIN_KEPT:
        allows = (
            f" (its pipeline allows {bound:.2f}x)" if (bound := report["pipeline_allows"]) else ""
        )
        found.append(f"keeps {gain_kept:.0%} of one rank's gain, less than {GAIN_KEPT:.0%}{allows}")
    return [f"{model}, {layout}: {line}" for line in found]


def check_exclusion(exclusion: Exclusion, options: argparse.Namespace) -> str | None:
    """Run an excluded layout uncached; return what differs from what is written of it, or None."""
    layout = next(name for name, (_, flags) in LAYOUTS.items() if exclusion.flag in flags)
    arguments = command(exclusion.model, layout, f"--output_dir={options.output_dir}/excluded")
    try:
        launch(arguments, options.limit_s)
    except RuntimeError as error:
        if exclusion.error is not None and exclusion.error in str(error):
            return None
        return f"{exclusion.model}, {exclusion.flag}: fails otherwise than written\n{error}"
    return f"{exclusion.model}, {exclusion.flag}: runs; take it out of EXCLUDED"

#!/usr/bin/env python3
"""Run every registered model in every layout, uncached and cached, and write down what came out.

    python scripts/layouts.py                                       # all: docs/layouts.md
    python scripts/layouts.py --models sd3 --layouts "1 rank" "cfg 2" --output runs/sd3.md

A cell is one command of scripts/generate.py on the model's embedded toy, under torchrun, with
baseline and cache in turn; reports and pictures stay under --output_dir. Exits with status 1
where a cell falls short, after all have run; the page and the output list what and by how much.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from rich.console import Console

from diffusers_adapters.registry import adapters
from toys.captions import sample_captions
from toys.checker import check_caption

ROOT = Path(__file__).resolve().parent.parent
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
        error: what xDiT itself says.
    """

    model: str
    flag: str
    reason: str
    error: str


EXCLUDED = (
    Exclusion(
        "flux",
        CFG,
        "FLUX.1 is distilled: its pipeline makes one call a step and has no second branch",
        "CFG parallelism is not supported by the model",
    ),
)

# Shown by tests/test_replicas.py.
VAE_RANKS = (
    "- Separate VAE ranks (`vae_parallel_size=1`): the VAE rank dies in xDiT's own group set-up "
    "with a bare `AssertionError` (`group_coordinator.py, __init__: assert self.cpu_group is not "
    "None`), since it is in no model replica. The groups alone are tested: the decision group is "
    "without the VAE rank, and a cache on a VAE rank is refused."
)

# Steps that xDiT's pipeline runs all tokens through the stages one after another, its default.
SYNCHRONOUS_STEPS = 1

# What a cell has to reach.
PSNR_DB = 35.0
GAIN_KEPT = 0.9
ACCURACY_POINTS = 2.0


def cells() -> list[tuple[str, str]]:
    """Return every (model, layout) that xDiT runs uncached."""
    left_out = {(e.model, e.flag) for e in EXCLUDED}
    return [
        (model, layout)
        for model in adapters()
        for layout, (_, flags) in LAYOUTS.items()
        if not any((model, flag) in left_out for flag in flags)
    ]


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
    quiet = {"LOG_LEVEL": "warning", "TRANSFORMERS_VERBOSITY": "error"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    full = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    with subprocess.Popen(
        full,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            # torchrun ends its ranks when it is asked to; killed, it would leave them running.
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate()
            raise RuntimeError(f"ended after {limit_s} s\n{output[-3000:]}") from None
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}\n{output[-3000:]}")
    return output


def run_cell(model: str, layout: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one cell and return generate.py's report."""
    directory = Path(options.output_dir) / model / layout.replace(" ", "_")
    pictures = pictures_of(model, options.sequences)
    captions = sample_captions(pictures, seed=0, split="unseen")
    flags = (f"--repeat={options.repeat}", f"--output_dir={directory}", "--prompt", *captions)
    launch(command(model, layout, *flags), options.limit_s)
    report = json.loads((ROOT / directory / "report.json").read_text())
    stages = report["parallel"]["pipefusion"]
    report["pipeline_allows"] = None
    if stages > 1:
        lines = (ROOT / directory / "trace.jsonl").read_text().splitlines()
        decisions = [json.loads(line)["decision"] == "skipped" for line in lines]
        config = report["cache_config"]
        report["pipeline_allows"] = pipeline_allows(
            decisions,
            stages,
            stages,
            config["stagger_stages"],
            config["computed_steps"] is not None,
        )
    return report


def pipeline_slots(
    skipped: list[bool], stages: int, patches: int, stagger: bool, masked: bool = False
) -> int:
    """Return how long a pipeline takes, in units of one stage's work on one patch.

    A stage takes the patches in order; the first one needs what the last made of the same patch at
    the step before. Skipped work and messages take no time. Steps that are not patched go through
    the stages one after another.

    Args:
        skipped: a flag a step, for the stack as one span.
        stages: of the pipeline.
        patches: that a step is cut into.
        stagger: whether stages act as with `stagger_stages`.
        masked: whether a mask decides; else the first two steps and the last are computed by all.
    """
    steps = len(skipped)
    together = () if masked else (1, steps - 1)
    now = SYNCHRONOUS_STEPS * stages * patches
    free = [now] * stages
    latents = [now] * patches
    for step in range(SYNCHRONOUS_STEPS, steps):
        for patch in range(patches):
            arrived = latents[patch]
            for stage in range(stages):
                ahead = stagger and stage + patch >= patches and step not in together
                computed = not skipped[min(step + ahead, steps - 1)]
                if ahead and step == steps - 1:  # computed a step before, if on its own
                    computed = computed and not skipped[step - 1]
                arrived = max(arrived, free[stage]) + computed
                free[stage] = arrived
            latents[patch] = arrived
    return max(free)


def pipeline_allows(
    skipped: list[bool], stages: int, patches: int, stagger: bool, masked: bool = False
) -> float:
    """Return the speedup of these decisions where skipped work and messages cost nothing.

    Example:
        >>> round(pipeline_allows([False, True] * 8, stages=2, patches=2, stagger=False), 2)
        1.4
        >>> round(pipeline_allows([False, True] * 8, stages=2, patches=2, stagger=True), 2)
        1.94
    """
    uncached = pipeline_slots([False] * len(skipped), stages, patches, stagger=False)
    return uncached / pipeline_slots(skipped, stages, patches, stagger, masked)


def run_captions(model: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the share of unseen captions that pictures pass, in percent: baseline and cached."""
    captions = sample_captions(options.captions, seed=0, split="unseen")
    directory = Path(options.output_dir) / model / "captions"
    flags = (f"--output_dir={directory}", "--prompt", *captions)
    launch(command(model, ONE_RANK, *flags), options.limit_s)
    passed = {}
    for kind in ("baseline", "cached"):
        pictures = [
            np.array(Image.open(ROOT / directory / f"{kind}_{i}.png"))
            for i in range(options.captions)
        ]
        results = [check_caption(p, c).passed for p, c in zip(pictures, captions, strict=True)]
        passed[kind] = 100.0 * sum(results) / options.captions
    report = json.loads((ROOT / directory / "report.json").read_text())
    return passed | {
        "psnr_db": report["psnr_db"],
        "hits": report["statistics"]["block_approx_ratio"],
    }


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
        if exclusion.error in str(error):
            return None
        return f"{exclusion.model}, {exclusion.flag}: fails otherwise than written\n{error}"
    return f"{exclusion.model}, {exclusion.flag}: runs; take it out of EXCLUDED"


def row(model: str, layout: str, report: dict[str, Any], gain_kept: float | None) -> str:
    """Return a line of the table."""
    statistics, latency = report["statistics"], report["latency_s"]
    allows = report["pipeline_allows"]
    psnr = "identical" if report["identical"] else f"{report['psnr_db']:.1f} dB"
    return (
        f"| {model} | {layout} | {report['world_size']} | {latency['baseline']:.2f} s "
        f"| {latency['cached']:.2f} s | {report['speedup']:.2f}x "
        f"| {'' if gain_kept is None else format(gain_kept, '.0%')} "
        f"| {'' if allows is None else format(allows, '.2f') + 'x'} | {psnr} "
        f"| {report['ssim']:.4f} | {statistics['block_approx_ratio']:.1%} "
        f"| {report['collectives_per_step']:.2f} |"
    )


def document(
    reports: dict[tuple[str, str], dict[str, Any]],
    kept: dict[tuple[str, str], float],
    accuracy: dict[str, dict[str, float]],
    failures: list[str],
    options: argparse.Namespace,
) -> str:
    """Return the Markdown page."""
    first = next(iter(reports.values()))
    environment = first["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "diffusers", "xfuser"))
    lines = [
        "# Every model in every layout",
        "",
        f"Written by `{shlex.join(['python', *sys.argv])}` on {environment['device']}, {versions}, "
        "over gloo, one thread a rank.",
        "",
        f"Each row is the embedded toy of that model, {first['num_inference_steps']} steps, "
        f"{options.sequences} sequences a step (so many pictures, with guidance half of them) of "
        f"{first['height']} x {first['width']}, with "
        "`configs/toy_MODEL_fast.yaml`; times are of the denoising loop (slowest rank, median of "
        f"{first['repeat']} runs, uncached and cached in turn). PSNR and SSIM compare with the "
        "uncached pictures of the same layout. *Gain kept* is the speedup divided by that of "
        f"1 rank. Where ranks outnumber the cores ({os.cpu_count()} here), they share them, and "
        "times say only how uncached and cached compare. PipeFusion runs asynchronously after one "
        "warm-up step, with as many patches as stages. *Pipeline allows* is the speedup that the "
        "very decisions would have if skipped work and messages cost nothing (see "
        "[staggered stages](decisions/staggered-stages.md)).",
        "",
        "| model | layout | ranks | uncached | cached | speedup | gain kept | pipeline allows "
        "| PSNR | SSIM | blocks skipped | collectives a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(*cell, report, kept.get(cell)) for cell, report in reports.items()),
        "",
    ]
    if accuracy:
        lines += [
            "## Do the pictures still show what the caption says?",
            "",
            f"{options.captions} captions that training has not seen, marked by "
            "`toys/checker.py`, 1 rank.",
            "",
            "| model | uncached | cached | PSNR | blocks skipped |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {model} | {found['baseline']:.1f} % | {found['cached']:.1f} % "
                f"| {found['psnr_db']:.1f} dB | {found['hits']:.1%} |"
                for model, found in accuracy.items()
            ),
            "",
        ]
    if failures:
        wanted = (
            f"Wanted are {PSNR_DB:.0f} dB, one collective a step and one digest in every cell, "
            f"{GAIN_KEPT:.0%} of one rank's gain on 2 ranks, and {ACCURACY_POINTS:.0f} points of "
            "captions."
        )
        first_lines = (failure.splitlines()[0] for failure in failures)
        lines += ["## What falls short", "", wanted, "", *(f"- {line}" for line in first_lines), ""]
    lines += ["## What xDiT cannot run, cached or not", ""]
    for exclusion in EXCLUDED:
        layouts = [name for name, (_, flags) in LAYOUTS.items() if exclusion.flag in flags]
        lines += [
            f"- {exclusion.model} with `{exclusion.flag}` ({', '.join(layouts)}): "
            f"{exclusion.reason}. xDiT says `{exclusion.error}`.",
        ]
    lines += [VAE_RANKS]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the cells, write the page, list what falls short."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(adapters()))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS))
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each kind a cell")
    parser.add_argument(
        "--sequences",
        type=int,
        default=32,
        help="that a step computes at once: a picture is one, with guidance two (default 32)",
    )
    parser.add_argument(
        "--captions", type=int, default=64, help="unseen captions to mark a model; 0 for none"
    )
    parser.add_argument("--limit_s", type=float, default=600, help="limit of one command")
    parser.add_argument("--output_dir", default="runs/layouts", help="reports and pictures")
    parser.add_argument("--output", default="docs/layouts.md", help="the page")
    options = parser.parse_args()
    chosen = [
        (model, layout)
        for model, layout in cells()
        if model in (options.models or adapters()) and layout in (options.layouts or LAYOUTS)
    ]
    console = Console()
    reports: dict[tuple[str, str], dict[str, Any]] = {}
    kept: dict[tuple[str, str], float] = {}
    accuracy: dict[str, dict[str, float]] = {}
    failures: list[str] = []

    def attempt(what: str, task: Any) -> Any:
        start = time.perf_counter()
        try:
            return task()
        except RuntimeError as error:
            failures.append(f"{what}: {error}")
            return None
        finally:
            console.print(f"{what}: {time.perf_counter() - start:.0f} s")

    for number, (model, layout) in enumerate(chosen, start=1):
        what = f"{number}/{len(chosen)} {model}, {layout}"
        report = attempt(what, lambda m=model, at=layout: run_cell(m, at, options))
        if report is None:
            continue
        reports[model, layout] = report
        single = reports.get((model, ONE_RANK))
        if single is not None and layout != ONE_RANK:
            kept[model, layout] = report["speedup"] / single["speedup"]
        failures += shortfalls(model, layout, report, kept.get((model, layout), 1.0))
        console.print(row(model, layout, report, kept.get((model, layout))), soft_wrap=True)
    alone = [model for model, layout in chosen if layout == ONE_RANK]
    for model in alone if options.captions else []:
        found = attempt(f"{model}, captions", lambda m=model: run_captions(m, options))
        if found is not None:
            accuracy[model] = found
            lost = found["baseline"] - found["cached"]
            if abs(lost) > ACCURACY_POINTS:
                failures.append(f"{model}: caption accuracy changes by {lost:.1f} points")
    for exclusion in EXCLUDED:
        what = f"{exclusion.model}, {exclusion.flag}, uncached"
        difference = attempt(what, lambda e=exclusion: check_exclusion(e, options))
        failures += [difference] if difference else []
    if reports:
        path = ROOT / options.output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document(reports, kept, accuracy, failures, options))
        console.print(f"{len(reports)} of {len(chosen)} cells in {options.output}")
    for failure in failures:
        console.print(f"[red]{failure}", soft_wrap=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

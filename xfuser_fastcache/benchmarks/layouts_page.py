"""The page of `fastcache layouts`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from xfuser_fastcache.benchmarks.layouts import (
    ACCURACY_POINTS,
    EXCLUDED,
    GAIN_KEPT,
    LAYOUTS,
    PSNR_DB,
)

# Shown by tests/test_replicas.py.
VAE_RANKS = (
    "- Separate VAE ranks (`vae_parallel_size=1`): the VAE rank dies in xDiT's own group set-up "
    "with a bare `AssertionError` (`group_coordinator.py, __init__: assert self.cpu_group is not "
    "None`), since it is in no model replica. The groups alone are tested: the decision group is "
    "without the VAE rank, and a cache on a VAE rank is refused."
)


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
    command: str,
) -> str:
    """Return the Markdown page.

    Args:
        reports: of the cells.
        kept: share of one rank's speedup that other cells keep.
        accuracy: of the captions, by model.
        failures: what falls short.
        options: of the run.
        command: that made it.
    """
    first = next(iter(reports.values()))
    environment = first["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "diffusers", "xfuser"))
    sizes = {
        model: f"{model}: {of['num_inference_steps']} steps, {of['height']} x {of['width']}"
        for (model, _), of in reports.items()
    }
    lines = [
        "# Every model in every layout",
        "",
        f"Written by `{command}` on {environment['device']}, {versions}, "
        "over gloo, one thread a rank.",
        "",
        f"Each row is the embedded toy of that model ({'; '.join(sizes.values())}), "
        f"{options.sequences} sequences a step (so many pictures, with guidance half of them), "
        "with `configs/toy_MODEL_fast.yaml`; times are of the denoising loop (slowest rank, median "
        f"of {first['repeat']} runs, uncached and cached in turn). PSNR and SSIM compare with the "
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
            "the toys' checkers, 1 rank.",
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
            f"{exclusion.sentence}",
        ]
    lines += [VAE_RANKS]
    return "\n".join(lines) + "\n"

#!/usr/bin/env python3
"""Take apart what a cache costs under PipeFusion, one factor at a time, on an embedded toy.

    torchrun --standalone --nproc_per_node 2 scripts/dev/pipefusion.py --model flux --stages 2
    torchrun ... scripts/dev/pipefusion.py --model flux --stages 2 --calibration FILE

Every row draws the same captions from the same noise. Pictures are compared with the uncached ones
of the same layout, and with those of one rank, which PipeFusion alone already moves away from:
PSNR in dB, mean over pictures, with its 95 % interval. What the pipeline allows is the speedup of
these decisions if skipped work and messages cost nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch.distributed as dist

from xfuser_fastcache import (
    apply_cache_on_transformer,
    get_cache_statistics,
    get_cache_trace,
    remove_cache,
)
from xfuser_fastcache.benchmarks.curves import interval
from xfuser_fastcache.benchmarks.pipelining import pipeline_allows
from xfuser_fastcache.benchmarks.subject import RankSubject, Subject
from xfuser_fastcache.calibration.checkout import ROOT
from xfuser_fastcache.calibration.prompts import AUDIT, CALIBRATE, prompts_for
from xfuser_fastcache.reports.measured import psnr_db
from xfuser_fastcache.xdit.loaded import (
    call_arguments,
    finish,
    load_in_layout,
    load_pipeline,
    start,
    xdit_parser,
)

STEPS, PIXELS = 28, 128
# Seed of the choice of captions.
CHOSEN_BY = 7
AGED, STAGGERED = {"patch_kv_slope": 0.0}, {"stagger_stages": True}


def rows(toy: str, computed: int, made: str) -> dict[str, dict[str, Any]]:
    """Return the cache's options by what they are called.

    Args:
        toy: its folder.
        computed: steps.
        made: a calibration that was made in this layout, to be compared; "" for all other rows.
    """
    mask = {"calibration": f"{toy}/fastcache.safetensors"}
    even = {"computed_steps": computed}
    if made:
        return {
            f"mask of {computed}, calibrated on one rank": {**mask, "computed_steps": computed},
            f"mask of {computed}, calibrated here": {
                "calibration": made,
                "computed_steps": computed,
            },
        }
    found = {}
    for steps in (computed, 14):
        calibrated = {**mask, "computed_steps": steps}
        found |= {
            f"mask of {steps}, keys as old as the gap": {**calibrated, **AGED},
            f"mask of {steps}, keys carried": calibrated,
            f"mask of {steps}, stages staggered": {**calibrated, **STAGGERED},
        }
    return found | {
        f"{computed} even steps, keys as old as the gap": {**even, **AGED},
        f"{computed} even steps, keys carried": even,
        "gate at 0.1, keys as old as the gap": {"cache_ratio_threshold": 0.1, **AGED},
        "gate at 0.1, keys carried": {"cache_ratio_threshold": 0.1},
    }


def psnrs(images: list[np.ndarray], others: list[np.ndarray]) -> np.ndarray:
    """Return the PSNR of each picture, in dB."""
    return np.array([psnr_db(a, b) for a, b in zip(images, others, strict=True)])


def decibels(found: np.ndarray) -> str:
    """Return the mean over pictures with its interval, in words."""
    if np.isinf(found).all():
        return "identical"
    low, high = interval(found) or (found.mean(), found.mean())
    return f"{found.mean():.1f} ({low:.1f} to {high:.1f})"


def allowed(trace: list[dict[str, Any]], stages: int, patches: int, config: dict[str, Any]) -> str:
    """Return what the pipeline allows these decisions, in words."""
    skipped = [entry["decision"] == "skipped" for entry in trace]
    how = config.get("stagger_stages", False), "computed_steps" in config
    return f"{pipeline_allows(skipped, stages, patches, *how):.2f}x"


def main() -> None:
    """Draw all rows; the first rank prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="flux", help="of a toy with a calibration")
    parser.add_argument("--stages", type=int, default=2, help="of the pipeline")
    parser.add_argument("--patches", type=int, help="of the pipeline; else as many as stages")
    parser.add_argument("--computed_steps", type=int, help="else 10 for flux, 12 for others")
    parser.add_argument("--num_prompts", type=int, default=8)
    parser.add_argument("--warmup_steps", type=int, default=1, help="synchronous steps")
    parser.add_argument("--calibration", default="", help="made in this layout; it alone is tried")
    parser.add_argument("--choose", action="store_true", help="on captions that choose, not judge")
    options = parser.parse_args()
    patches = options.patches or options.stages
    computed = options.computed_steps or (10 if options.model == "flux" else 12)
    toy = str(ROOT / "toys" / options.model)
    prompts = prompts_for(
        toy, CALIBRATE if options.choose else AUDIT, options.num_prompts, CHOSEN_BY
    )
    seeds = [100 + i for i in range(options.num_prompts)]
    start()
    sizes = [f"--height={PIXELS}", f"--width={PIXELS}", f"--num_inference_steps={STEPS}"]
    stages = f"--pipefusion_parallel_degree={options.stages}", f"--num_pipeline_patch={patches}"
    warm_up = f"--warmup_steps={options.warmup_steps}"
    flags = xdit_parser().parse_args(["--model", toy, *sizes, *stages, warm_up])
    subject = RankSubject(load_in_layout(flags, "float32"), STEPS, call_arguments(toy))
    first = dist.get_rank() == 0
    one_rank: list[np.ndarray] = []
    if first:
        alone = Subject(load_pipeline(toy, "float32"), STEPS, call_arguments(toy))
        one_rank = alone.generate(prompts, seeds).images
    uncached = subject.generate(prompts, seeds).images

    def say(*cells: str) -> None:
        if first:
            print("| " + " | ".join(cells) + " |", flush=True)

    say(options.model, "skipped", "pipeline allows", "dB to uncached", "dB to one rank", "carried")
    say(*["---"] * 6)
    if first:
        say("uncached", "0 %", "1.00x", "", decibels(psnrs(uncached, one_rank)), "")
    found: dict[str, np.ndarray] = {}
    for name, config in rows(toy, computed, options.calibration).items():
        apply_cache_on_transformer(subject.transformer, use_cache="Fast", **config)
        images = subject.generate(prompts, seeds).images
        statistics = get_cache_statistics(subject.transformer)
        trace = get_cache_trace(subject.transformer)
        remove_cache(subject.transformer)
        if first:
            found[name] = psnrs(images, uncached)
            say(
                name,
                f"{statistics['block_approx_ratio']:.1%}",
                allowed(trace, options.stages, patches, config),
                decibels(found[name]),
                decibels(psnrs(images, one_rank)),
                str(statistics["carried_keys"]),
            )
    if first and options.calibration:
        alone, here = found.values()
        print(f"calibrated here, picture by picture: {decibels(here - alone)} dB more")
    finish()


if __name__ == "__main__":
    main()

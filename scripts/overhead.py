#!/usr/bin/env python3
"""Measure what the cache costs when its gate never passes: the never-skip ratio.

    python scripts/overhead.py --config configs/toy_flux_fast.yaml --pairs 30

Runs pairs of generations, uncached and with a gate that measures, agrees and decides at every step
and never skips, in alternating order, and prints the median of the pairwise ratios of the denoising
loop with a 95 % bootstrap interval. Takes the flags of generate.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from generate import Generator, cache_config, load, options_from, start
from rich.progress import track

from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.xdit import cpu_platform

# Small enough to reject every change, large enough not to be the "never" that needs no test.
NEVER = 1e-9


def main() -> None:
    """Run the pairs and print the ratio."""
    arguments = sys.argv[1:]
    pairs = 30
    if "--pairs" in arguments:
        at = arguments.index("--pairs")
        pairs = int(arguments[at + 1])
        del arguments[at : at + 2]
    start()
    options = options_from(arguments)
    config = replace(cache_config(options) or CacheConfig(), cache_ratio_threshold=NEVER)
    generator = Generator(load(options), options)
    generator.run("warm-up")
    generator.run("warm-up", config)
    seconds = np.zeros((pairs, 2))
    first_rank = dist.get_rank() == 0
    for pair in track(range(pairs), "pairs", disable=not first_rank):
        for cached in (False, True) if pair % 2 else (True, False):
            run = generator.run("", config if cached else None)
            if cached and run.statistics["block_approx_ratio"]:
                raise RuntimeError("the gate let a block be skipped; this measures nothing")
            ranks = generator.gather(run)
            if first_rank:
                seconds[pair, int(cached)] = max(r.seconds for r in ranks if r is not None)
    if first_rank:
        ratios = seconds[:, 1] / seconds[:, 0]
        draws = np.random.default_rng(0).choice(ratios, (10_000, pairs))
        low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
        per_step = np.median(seconds, axis=0) / options.num_inference_steps * 1e3
        print(
            f"never-skip ratio {np.median(ratios):.4f} (95 % interval {low:.4f} to {high:.4f}, "
            f"{pairs} pairs); a step takes {per_step[0]:.2f} ms uncached, {per_step[1]:.2f} ms "
            f"cached; {dist.get_world_size()} rank(s), granularity {config.granularity!r}, "
            f"{len(options.prompt)} picture(s)"
        )
        if options.report:
            Path(options.report).write_text(
                json.dumps({"ratios": ratios.tolist(), "interval": [low, high]}) + "\n"
            )
    cpu_platform.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

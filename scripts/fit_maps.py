#!/usr/bin/env python3
"""Fit linear maps of the stack of blocks, on runs that compute everything.

    python scripts/fit_maps.py --model toys/flux --num_prompts 24 --seed 1 \
        --output runs/flux_maps.safetensors

Records what enters and leaves the stack, fits how the residual's change follows the input's on two
generations of three, and judges on the third: a map stands where it clearly beats the forecast
without one. One file for both forecasters, static tokens of a motion/static split, every layout but
PipeFusion and every number of steps:

    CacheConfig(linear_maps="runs/flux_maps.safetensors")                          # linear_taylor
    CacheConfig(linear_maps="runs/flux_maps.safetensors", forecaster="linear")
    CacheConfig(linear_maps="runs/flux_maps.safetensors", motion_threshold=0.01)   # static tokens

Host memory, with D channels, T steps and h generations held out: 8 T D bytes a recorded token of a
stream, and 16 D^2 bytes (half of that on a GPU, and there) for each of 2 forecasters x streams x
buckets x (h + 1). For FLUX.1 with the defaults (24 prompts): 1.1 GB, and 8.2 GB of the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read as transformers is imported

import torch
from _bench.settings import read_prompts
from _bench.subject import DTYPES
from calibrate import Calibrator
from rich.console import Console
from rich.progress import track
from rich.table import Table

from toys.captions import sample_captions
from xfuser_fastcache.artifacts.linear_maps import FittedMaps
from xfuser_fastcache.calibration.maps import Choice
from xfuser_fastcache.calibration.stack import Place, StackRecorder, StackSums

# Every so many generations one is held out; of the held-out ones `choose` needs two.
HELD_OUT_EVERY = 3
FEWEST = 2 * HELD_OUT_EVERY


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", required=True, help="a diffusers folder or hub name")
    flags.add_argument("--prompts", type=Path, help="a file, one a line; default: captions")
    flags.add_argument("--num_prompts", type=int, default=24, help="generations (default 24)")
    flags.add_argument("--seed", type=int, default=0, help="of captions and noise (default 0)")
    flags.add_argument("--num_inference_steps", type=int, default=28)
    flags.add_argument(
        "--max_lag", type=int, default=6, help="farthest anchor looked at, in steps (default 6)"
    )
    flags.add_argument(
        "--buckets", type=int, default=3, help="of gaps in noise level, a map each (default 3)"
    )
    flags.add_argument(
        "--max_tokens", type=int, default=1024, help="recorded of a stream (default 1024)"
    )
    flags.add_argument("--call", type=json.loads, help="JSON: arguments of the pipeline's call")
    flags.add_argument("--dtype", choices=DTYPES, help="default bfloat16, float32 without a GPU")
    flags.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    options = flags.parse_args(arguments)
    if options.num_prompts < FEWEST:
        flags.error(
            f"--num_prompts {options.num_prompts}: give {FEWEST} or more, of which one in "
            f"{HELD_OUT_EVERY} is held out"
        )
    for name in ("max_lag", "buckets", "max_tokens"):
        if getattr(options, name) < 1:
            flags.error(f"--{name} {getattr(options, name)}: give 1 or more")
    if options.num_inference_steps < 3:
        flags.error(f"--num_inference_steps {options.num_inference_steps}: give 3 or more")
    return options


def fit(options: argparse.Namespace) -> tuple[FittedMaps, dict[Place, Choice]]:
    """Run the generations, fit and choose."""
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, options.num_prompts)
    else:
        prompts = sample_captions(options.num_prompts, seed=options.seed, split="train")
    runs = Calibrator(options, prompts, None)
    transformer = runs.pipe.transformer
    device = next(transformer.parameters()).device
    # Most GPUs are slow in float64.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    sums = None
    with StackRecorder(transformer, runs.adapter, options.max_tokens) as recorder:
        for index in track(range(len(prompts)), "full computation", transient=True):
            runs.latents(index)
            if sums is None:
                levels = runs.levels().tolist()
                sums = StackSums(levels, options.max_lag, options.buckets, dtype, device)
            held_out = index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            sums.add(recorder.take(len(sums.levels)), held_out)
    assert sums is not None
    choices = sums.choices()
    metadata = {**runs.metadata(), "max_lag": options.max_lag, "max_tokens": options.max_tokens}
    return FittedMaps(sums.maps(choices), metadata), choices


def table(fitted: FittedMaps, choices: dict[Place, Choice]) -> Table:
    """Return what was chosen, a row a forecaster, stream and bucket."""
    found = Table(title="mean squared error of the residual on held-out generations")
    for name in ("forecaster", "stream", "gap up to", "map", "with it", "without", "share"):
        found.add_column(name, justify="left" if name in ("forecaster", "stream") else "right")
    for place, choice in choices.items():
        candidate = choice.candidate
        form = "reuse" if candidate is None else candidate.form
        if candidate is not None and candidate.rank:
            form = f"rank {candidate.rank}"
        found.add_row(
            place.forecaster,
            place.stream,
            f"{fitted.of[place.forecaster].edges[place.bucket]:.4f}",
            form,
            f"{choice.held_out_error:.3g}",
            f"{choice.reuse_error:.3g}",
            f"{choice.held_out_error / choice.reuse_error:.1%}" if choice.reuse_error else "",
        )
    return found


def main(arguments: list[str]) -> int:
    """Fit, write and print; return the exit status."""
    options = parse(arguments)
    console = Console(width=100)
    try:
        fitted, choices = fit(options)
    except ValueError as error:
        console.print(f"fit_maps.py: {error}", style="red", markup=False)
        return 2
    fitted.save(options.output)
    console.print(table(fitted, choices))
    console.print(f"written: {options.output}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main(sys.argv[1:]))

"""Fit linear maps of the stack of blocks, on runs that compute everything.

    fastcache fit-maps --model toys/flux --num_prompts 24 --seed 1 \\
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
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from xfuser_fastcache.artifacts.linear_maps import FittedMaps
from xfuser_fastcache.calibration.maps import Choice
from xfuser_fastcache.calibration.options import RunOptions, options_of
from xfuser_fastcache.calibration.prompts import CALIBRATE
from xfuser_fastcache.calibration.runs import Runs
from xfuser_fastcache.calibration.stack import Place, StackRecorder, StackSums
from xfuser_fastcache.cli.flags import progress_of
from xfuser_fastcache.cli.recording import prompts_of, recording_flags

# Every so many generations one is held out; of the held-out ones `choose` needs two.
HELD_OUT_EVERY = 3
FEWEST = 2 * HELD_OUT_EVERY


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    flags = recording_flags("fit-maps", __doc__, num_prompts=24)
    flags.add_argument(
        "--max_lag", type=int, default=6, help="farthest anchor looked at, in steps (default 6)"
    )
    flags.add_argument(
        "--buckets", type=int, default=3, help="of gaps in noise level, a map each (default 3)"
    )
    flags.add_argument(
        "--max_tokens", type=int, default=1024, help="recorded of a stream (default 1024)"
    )
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
    prompts = prompts_of(options, CALIBRATE)
    runs = Runs(options_of(RunOptions, options), prompts)
    transformer = runs.pipe.transformer
    device = next(transformer.parameters()).device
    # Most GPUs are slow in float64.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    sums = None
    with StackRecorder(transformer, runs.adapter, options.max_tokens) as recorder:
        for index in progress_of(options).track(range(len(prompts)), "full computation"):
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
        form: str = "reuse" if candidate is None else candidate.form
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


@torch.no_grad()
def main(arguments: list[str]) -> int:
    """Fit, write and print; return the exit status."""
    options = parse(arguments)
    console = Console(width=100)
    fitted, choices = fit(options)
    fitted.save(options.output)
    console.print(table(fitted, choices))
    console.print(f"written: {options.output}", markup=False, soft_wrap=True)
    return 0

"""Fit TeaCache's polynomial to a model, on runs that compute everything.

    fastcache fit-polynomial --model toys/sd3 --output runs/sd3_tea.yaml

Records how much the first block's modulated input and the transformer's output change from step to
step, and writes a cache config that `--config`'s `cache_config`, or

    CacheConfig.from_file("runs/sd3_tea.yaml")

takes. One process, one picture at a time; the polynomial serves every layout and every threshold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml

from xfuser_fastcache.calibration.options import RunOptions, options_of
from xfuser_fastcache.calibration.polynomial import ChangeRecorder, Fit, fit_polynomial
from xfuser_fastcache.calibration.prompts import CALIBRATE
from xfuser_fastcache.calibration.runs import Runs
from xfuser_fastcache.cli.flags import progress_of
from xfuser_fastcache.cli.recording import prompts_of, recording_flags


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    flags = recording_flags("fit-polynomial", __doc__, num_prompts=16)
    flags.add_argument("--degree", type=int, default=4, help="of the polynomial (default 4)")
    flags.add_argument("--output", type=Path, required=True, help="the YAML file to write")
    return flags.parse_args(arguments)


def record(options: argparse.Namespace) -> list[tuple[float, float]]:
    """Run the generations and return their changes."""
    prompts = prompts_of(options, CALIBRATE)
    runs = Runs(options_of(RunOptions, options), prompts)
    pairs = []
    with ChangeRecorder(runs.pipe.transformer, runs.adapter) as recorder:
        for index in progress_of(options).track(range(len(prompts)), "full computation"):
            runs.latents(index)
            pairs += recorder.take()
    return pairs


def written(options: argparse.Namespace, pairs: int, fit: Fit) -> str:
    """Return the file: what it was made from, and the options of the cache."""
    low, high = fit.domain
    notes = (
        f"fastcache fit-polynomial --model {options.model} --num_prompts {options.num_prompts} "
        f"--seed {options.seed} --num_inference_steps {options.num_inference_steps} "
        f"--degree {options.degree}",
        f"{pairs} steps; changes of the input {low:.4f} to {high:.4f}; correlation with the change",
        f"of the output {fit.correlation:.3f}, of the input itself {fit.of_input:.3f}",
    )
    options_of_cache = {"use_cache": "Tea", "coefficients": fit.coefficients}
    head = "".join(f"# {note}\n" for note in notes)
    return head + yaml.safe_dump(options_of_cache, sort_keys=False)


@torch.no_grad()
def main(arguments: list[str]) -> int:
    """Record, fit, write; return the exit status."""
    options = parse(arguments)
    pairs = record(options)
    text = written(options, len(pairs), fit_polynomial(pairs, options.degree))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0

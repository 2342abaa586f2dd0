#!/usr/bin/env python3
"""Fit TeaCache's polynomial to a model, on runs that compute everything.

    python scripts/fit_polynomial.py --model toys/sd3 --output runs/sd3_tea.yaml

Records how much the first block's modulated input and the transformer's output change from step to
step, and writes a cache config that `--config`'s `cache_config`, or

    CacheConfig.from_file("runs/sd3_tea.yaml")

takes. One process, one picture at a time; the polynomial serves every layout and every threshold.
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
import yaml
from _bench.settings import call_arguments, read_prompts
from _bench.subject import DTYPES, known_arguments, load_pipeline
from rich.progress import track

from toys.captions import sample_captions
from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.calibration.polynomial import ChangeRecorder, Fit, fit_polynomial


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", required=True, help="a diffusers folder or hub name")
    flags.add_argument("--prompts", type=Path, help="a file, one a line; default: captions")
    flags.add_argument("--num_prompts", type=int, default=16, help="generations (default 16)")
    flags.add_argument("--seed", type=int, default=0, help="of captions and noise (default 0)")
    flags.add_argument("--num_inference_steps", type=int, default=28)
    flags.add_argument("--degree", type=int, default=4, help="of the polynomial (default 4)")
    flags.add_argument("--call", type=json.loads, help="JSON: arguments of the pipeline's call")
    flags.add_argument("--dtype", choices=DTYPES, help="default bfloat16, float32 without a GPU")
    flags.add_argument("--output", type=Path, required=True, help="the YAML file to write")
    return flags.parse_args(arguments)


def record(options: argparse.Namespace) -> list[tuple[float, float]]:
    """Run the generations and return their changes."""
    pipe = load_pipeline(options.model, options.dtype)
    call = call_arguments(options.model) if options.call is None else options.call
    call = known_arguments(pipe, call)
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, options.num_prompts)
    else:
        prompts = sample_captions(options.num_prompts, seed=options.seed, split="train")
    transformer = pipe.transformer
    with ChangeRecorder(transformer, adapter_of(transformer)) as recorder:
        pairs = []
        for index, prompt in enumerate(track(prompts, "full computation", transient=True)):
            pipe(
                prompt,
                num_inference_steps=options.num_inference_steps,
                generator=torch.Generator("cpu").manual_seed(1000 * options.seed + index),
                output_type="latent",
                **call,
            )
            pairs += recorder.take()
    return pairs


def written(options: argparse.Namespace, pairs: int, fit: Fit) -> str:
    """Return the file: what it was made from, and the options of the cache."""
    low, high = fit.domain
    notes = (
        f"scripts/fit_polynomial.py --model {options.model} --num_prompts {options.num_prompts} "
        f"--seed {options.seed} --num_inference_steps {options.num_inference_steps} "
        f"--degree {options.degree}",
        f"{pairs} steps; changes of the input {low:.4f} to {high:.4f}; correlation with the change",
        f"of the output {fit.correlation:.3f}, of the input itself {fit.of_input:.3f}",
    )
    options_of_cache = {"use_cache": "Tea", "coefficients": fit.coefficients}
    head = "".join(f"# {note}\n" for note in notes)
    return head + yaml.safe_dump(options_of_cache, sort_keys=False)


def main() -> None:
    """Record, fit, write."""
    options = parse(sys.argv[1:])
    pairs = record(options)
    text = written(options, len(pairs), fit_polynomial(pairs, options.degree))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()

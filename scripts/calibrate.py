#!/usr/bin/env python3
"""Calibrate a cache for one model, scheduler and number of steps; or audit a calibration.

    python scripts/calibrate.py --model toys/flux --cache_ratio_threshold 0.05 --seed 1 \\
        --output runs/flux.safetensors
    python scripts/calibrate.py --model toys/flux --audit runs/flux.safetensors --seed 2 \\
        --report runs/audit.json

Records generations with full computation, fits corrections of the output forecast and the gate's
thresholds, searches masks of computed steps, and records again with the cache on. A run that was
broken off goes on where it stopped when the same command is given again. One picture a generation,
one process; the file serves every layout. Then:

    CacheConfig(calibration="runs/flux.safetensors", significance_level=0.05)   # the gate decides
    CacheConfig(calibration="runs/flux.safetensors", computed_steps=7)          # a searched mask
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read as transformers is imported

import numpy as np
import torch
from _bench.settings import call_arguments, read_prompts
from _bench.subject import DTYPES, known_arguments, load_pipeline
from _masks import MaskTrials, given_masks, print_masks, saved
from rich.console import Console
from rich.progress import track
from rich.table import Table

from toys.captions import sample_captions
from xfuser_fastcache import CacheConfig, apply_cache_on_transformer, remove_cache
from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.artifacts.calibration import VERSION, Fitted, fingerprint, load_fitted
from xfuser_fastcache.calibration import build
from xfuser_fastcache.calibration.record import Recorder, Trajectory
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.hooks import hook_on


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", required=True, help="a diffusers folder or hub name")
    flags.add_argument("--prompts", type=Path, help="a file, one a line; default: captions")
    flags.add_argument("--num_prompts", type=int, help="generations (default: what alpha needs)")
    flags.add_argument("--seed", type=int, default=0, help="of captions and noise (default 0)")
    flags.add_argument("--num_inference_steps", type=int, default=28)
    flags.add_argument("--call", type=json.loads, help="JSON: arguments of the pipeline's call")
    flags.add_argument("--dtype", choices=DTYPES, help="default bfloat16, float32 without a GPU")
    flags.add_argument(
        "--cache_ratio_threshold",
        type=float,
        default=0.05,
        help="epsilon: relative error of the output from which on a skip does harm (default 0.05)",
    )
    flags.add_argument(
        "--significance_level",
        type=float,
        nargs="+",
        default=[0.05],
        help="alpha: share of harmful skips that is allowed; several give one file for all",
    )
    flags.add_argument(
        "--computed_steps",
        type=int,
        nargs="*",
        default=[],
        help="also search masks of so many computed steps",
    )
    flags.add_argument(
        "--moves", type=int, default=32, help="masks tried around each best one (default 32)"
    )
    flags.add_argument(
        "--start_from", type=Path, help="a calibration whose masks the search is to better"
    )
    flags.add_argument(
        "--batch_size",
        type=int,
        default=40,
        help="pictures that masks are fitted and tried on at once, 2 or more (default 40)",
    )
    flags.add_argument("--max_lag", type=int, default=10, help="largest gap looked at (default 10)")
    flags.add_argument("--max_tokens", type=int, default=4096, help="recorded of a picture")
    flags.add_argument("--output", type=Path, help="the file to write")
    flags.add_argument("--audit", type=Path, help="measure this file on fresh generations instead")
    flags.add_argument("--report", type=Path, help="JSON of the audit, or of the masks")
    options = flags.parse_args(arguments)
    if (options.output is None) == (options.audit is None):
        flags.error("give either --output FILE to calibrate, or --audit FILE")
    steps = options.num_inference_steps
    wrong = [count for count in options.computed_steps if not 1 <= count <= steps]
    if wrong:
        flags.error(f"--computed_steps {wrong[0]}: give 1 to {steps}, the --num_inference_steps")
    if options.start_from is not None and not options.computed_steps:
        flags.error("--start_from betters masks: say of how many steps with --computed_steps")
    if options.batch_size < 2:
        flags.error(f"--batch_size {options.batch_size}: give 2 or more, to fit on and to try on")
    return options


class Calibrator:
    """Runs one pipeline, plain or cached, a picture at a time, and keeps what it recorded.

    Args:
        options: of the command line.
        prompts: of the generations.
        folder: where records are kept until the run is done; None keeps none.
    """

    def __init__(self, options: argparse.Namespace, prompts: list[str], folder: Path | None):
        self.pipe = load_pipeline(options.model, options.dtype)
        self.options, self.prompts, self.folder = options, prompts, folder
        call = call_arguments(options.model) if options.call is None else options.call
        self.call = known_arguments(self.pipe, call)
        self.adapter = adapter_of(self.pipe.transformer)

    def latents(
        self, *indices: int, forecaster: OutputForecaster | None = None, **cache: Any
    ) -> torch.Tensor:
        """Return the final latents of a batch; cached where options of a cache are given.

        Args:
            *indices: of the generations in the batch.
            forecaster: takes the place of the cache's own.
            **cache: options.
        """
        transformer = self.pipe.transformer
        if cache:
            config = CacheConfig(forecaster="output", **cache)
            apply_cache_on_transformer(transformer, config=config, scheduler=self.pipe.scheduler)
        if forecaster is not None:
            hook_on(transformer).engine.forecaster = forecaster
        first = 1000 * self.options.seed
        try:
            return self.pipe(
                [self.prompts[index] for index in indices],
                num_inference_steps=self.options.num_inference_steps,
                generator=[torch.Generator("cpu").manual_seed(first + index) for index in indices],
                output_type="latent",
                **self.call,
            ).images
        finally:
            if cache:
                remove_cache(transformer)

    def record(self, index: int, name: str, **cache: Any) -> list[Trajectory]:
        """Return the record of one generation, from the folder where it is there already."""
        path = self.folder / f"{name}-{index:05d}.npz" if self.folder else None
        if path is not None and path.exists():
            return _read(path)
        tokens = self.options.max_tokens
        with Recorder(self.pipe.transformer, self.adapter, tokens) as recorder:
            self.latents(index, **cache)
        found = recorder.take()
        if path is not None:
            _write(path, found)
        return found

    def levels(self) -> np.ndarray:
        """Return the noise levels of the plan that the last generation ran by."""
        return np.array([step.noise_level for step in self.adapter.plan(self.pipe.scheduler)])

    def metadata(self) -> dict[str, Any]:
        """Return what the file says of its origin."""
        model, scheduler = self.pipe.transformer, self.pipe.scheduler
        blocks = sum(len(getattr(model, name)) for name in self.adapter.block_lists)
        return {
            **fingerprint(model, self.adapter.model_class, self.adapter.embedder, blocks),
            "scheduler": type(scheduler).__name__,
            "num_inference_steps": self.options.num_inference_steps,
            "seed": self.options.seed,
            "generations": len(self.prompts),
            "call": self.call,
            "versions": {name: version(name) for name in ("torch", "diffusers")},
        }


def _write(path: Path, found: list[Trajectory]) -> None:
    arrays = {
        f"{branch}_{name}": value
        for branch, trajectory in enumerate(found)
        for name, value in vars(trajectory).items()
    }
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(path)


def _read(path: Path) -> list[Trajectory]:
    with np.load(path) as held:
        count = 1 + max(int(name.split("_")[0]) for name in held.files)
        names = ("gram", "skipped", "errors")
        return [Trajectory(*(held[f"{b}_{name}"] for name in names)) for b in range(count)]


def prepare_folder(options: argparse.Namespace, prompts: list[str]) -> Path:
    """Make the folder of records beside the output, or check that it holds the same run.

    Raises:
        ValueError: it holds records of another run.
    """
    folder = options.output.with_suffix(".records")
    folder.mkdir(parents=True, exist_ok=True)
    names = ("model", "seed", "num_inference_steps", "call", "dtype", "max_tokens")
    wanted = {name: getattr(options, name) for name in names}
    wanted |= {"prompts": prompts, "version": VERSION}
    settings = folder / "settings.json"
    if settings.exists():
        found = json.loads(settings.read_text())
        different = [name for name in wanted if wanted[name] != found.get(name)]
        if different:
            raise ValueError(
                f"{folder} holds records of a run with another {', '.join(different)}; give the "
                "same flags to go on with it, or remove the folder"
            )
    else:
        settings.write_text(json.dumps(wanted, indent=2))
    return folder


def calibrate(runs: Calibrator, console: Console) -> tuple[Fitted, dict[str, Any]]:
    """Record, fit, search masks, choose scales; see the module."""
    options, alphas = runs.options, sorted(runs.options.significance_level)
    given = given_masks(options.start_from, options.num_inference_steps)
    indices = list(range(len(runs.prompts)))
    runs.latents(0)  # also sets the scheduler's steps
    full = [runs.record(i, "full") for i in track(indices, "full computation", console=console)]
    parts = build.split(full)
    metadata = {**runs.metadata(), "significance_levels": options.significance_level}
    fitted = build.fit(
        parts, runs.levels(), options.max_lag, options.cache_ratio_threshold, metadata
    )
    report: dict[str, Any] = {}
    if options.computed_steps:
        fitted, report["masks"] = MaskTrials(runs, fitted, parts, given, console).search()
    first = build.conformal_scales(fitted, parts.calibrate, alphas)
    scales, report["scales_full"], report["scales_cached"] = {}, first, {}
    for alpha in alphas:
        scales[alpha], tried = settle(runs, fitted, parts, alpha, first[alpha], console)
        report["scales_cached"][alpha] = tried
    return replace(fitted, scales=scales), report


def settle(
    runs: Calibrator,
    fitted: Fitted,
    parts: build.Parts,
    alpha: float,
    first: float,
    console: Console,
) -> tuple[float, dict[float, float]]:
    """Choose a scale again on runs with the cache on, whose states are not those of full runs.

    Returns:
        The scale, and what the runs with each scale that was tried allow.
    """
    options, tried = runs.options, {}
    count = len(runs.prompts)
    kind = "corrected" if fitted.weights.any() else "plain"

    def allowed(scale: float) -> float:
        name = f"cached-{kind}-{options.cache_ratio_threshold}-{options.max_lag}-{scale}"
        title = f"cache on, alpha {alpha}, scale {scale:.3f}"
        with saved(replace(fitted, scales={alpha: scale}), options.output) as path:
            cache = {"calibration": path, "significance_level": alpha}
            tail = track(range(count - len(parts.calibrate), count), title, console=console)
            cached = [runs.record(index, name, **cache) for index in tail]
        tried[scale] = build.conformal_scales(fitted, cached, [alpha])[alpha]
        return tried[scale]

    return build.settled_scale(first, allowed), tried


def audit(runs: Calibrator, console: Console) -> dict[str, Any]:
    """Run fresh generations with the cache on, and say how often its skips did harm."""
    path = runs.options.audit
    fitted = load_fitted(path)
    indices = track(range(len(runs.prompts)), "audit", console=console)
    alphas = sorted(fitted.scales)
    report: dict[str, Any] = {"calibration": str(path), "levels": {}}
    records: dict[float, list[Any]] = {alpha: [] for alpha in alphas}
    for index in indices:
        for alpha in alphas:
            cache = {"calibration": str(path), "significance_level": alpha}
            records[alpha].append(runs.record(index, f"audit-{alpha}", **cache))
    epsilon = fitted.metadata["cache_ratio_threshold"]
    for alpha in alphas:
        report["levels"][str(alpha)] = build.audit(fitted, records[alpha], epsilon)
    return report


def print_audit(report: dict[str, Any], console: Console) -> None:
    """Print an audit as a table."""
    table = Table(title=f"audit of {report['calibration']}")
    for name in ("alpha", "false-skip rate", "95 %", "skips", "hit ratio", "oracle's", "literal"):
        table.add_column(name, justify="right")
    for alpha, found in report["levels"].items():
        low, high = found["false_skip_interval"] or (float("nan"),) * 2
        table.add_row(
            alpha,
            f"{found['false_skip_rate']:.4f}",
            f"{low:.4f} to {high:.4f}",
            str(found["skips"]),
            f"{found['hit_ratio']:.1%}",
            f"{found['oracle']['hit_ratio']:.1%}",
            f"{found['literal_test']['false_skip_rate']:.4f}",
        )
    console.print(table)


def prompts_of(options: argparse.Namespace, needed: int) -> list[str]:
    """Return the prompts of the generations; fresh captions of the toys where no file is given."""
    if options.prompts is not None:
        return read_prompts(options.prompts, options.num_prompts)
    kind = "train" if options.audit is None else "unseen"
    return sample_captions(options.num_prompts or needed, seed=options.seed, split=kind)


def main(arguments: list[str]) -> int:
    """Calibrate or audit; return the exit status."""
    options = parse(arguments)
    console = Console(width=100)
    try:
        if options.audit is not None:
            runs = Calibrator(options, prompts_of(options, 64), None)
            report = audit(runs, console)
            print_audit(report, console)
        else:
            needed = build.generations_needed(options.significance_level)
            prompts = prompts_of(options, needed)
            if len(prompts) < needed:
                raise ValueError(
                    f"{len(prompts)} generations, but alpha = {min(options.significance_level)} "
                    f"needs {needed}: give more prompts or allow a larger --significance_level"
                )
            folder = prepare_folder(options, prompts)
            fitted, report = calibrate(Calibrator(options, prompts, folder), console)
            fitted.save(options.output)
            console.print(f"written: {options.output}", markup=False, soft_wrap=True)
            console.print(f"scales: {fitted.scales}", markup=False)
            if "masks" in report:
                print_masks(report["masks"], fitted, console)
    except ValueError as error:
        console.print(f"calibrate.py: {error}", style="red", markup=False)
        return 2
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python3
"""Generate pictures with a step cache, on as many ranks as torchrun starts.

    torchrun --nproc_per_node 2 scripts/generate.py --config configs/toy_flux_fast.yaml \\
        --ulysses_degree 2 --baseline --output_dir runs/out

Takes all of xDiT's flags. A config file holds flags by their names; the command line wins.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from _measure import DenoisingTimer, PeakMemory, psnr_db, ssim

from xfuser_fastcache import comparison_sheet, save_heat_map, statistics_table, write_trace
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.config.mappings import read_mapping
from xfuser_fastcache.xdit import cpu_platform
from xfuser_fastcache.xdit.integration import METHODS, read_options, requested
from xfuser_fastcache.xdit.mends import mend_xfuser

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Run:
    """One timed generation on this rank.

    Attributes:
        seconds: of the denoising loop.
        peak_bytes: None where the system cannot tell.
        images: pictures in [0, 1], `(height, width, 3)`; empty on a rank that holds none.
        statistics: of the cache; empty without one.
        trace: of the cache's decisions; likewise.
    """

    seconds: float
    peak_bytes: int | None
    images: list[np.ndarray] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)


def parser() -> argparse.ArgumentParser:
    """Return a parser for xDiT's flags and ours."""
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    flags = FlexibleArgumentParser(
        description=__doc__.splitlines()[0], conflict_handler="resolve", allow_abbrev=False
    )
    xFuserArgs.add_cli_args(flags)
    for action in flags._actions:
        action.required = False  # a config file may give it
    flags.set_defaults(model="")  # xDiT's default would be loaded where none is given
    ours = flags.add_argument_group("Step cache")
    ours.add_argument("--config", help="YAML or JSON file with flags by name")
    ours.add_argument(
        "--use_cache",
        nargs="?",
        const=True,
        default=False,
        help="backend of the step cache, such as Fast; bare, it is DiTFastAttn's flag",
    )
    ours.add_argument("--baseline", action="store_true", help="also run uncached and compare")
    ours.add_argument("--repeat", type=int, default=1, help="timed runs; medians are reported")
    ours.add_argument("--output_dir", default="runs/generate", help="where pictures go")
    ours.add_argument("--report", help="JSON report; default OUTPUT_DIR/report.json")
    ours.add_argument("--dtype", choices=DTYPES, help="default bfloat16, float32 without a GPU")
    return flags


def read_flags(flags: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse a command line over the config file it names.

    Raises:
        ValueError: the file does not parse, or holds a key that is no flag.
        SystemExit: a wrong flag, or no model.
    """
    path = flags.parse_args(arguments).config
    if path:
        given = read_mapping(path)
        known = {action.dest for action in flags._actions} - {"help", "config"}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(
                f"{path}: {', '.join(map(repr, unknown))} is no flag of this script; "
                f"see scripts/{flags.prog} --help"
            )
        flags.set_defaults(**given)
    options = flags.parse_args(arguments)
    if not options.model:
        flags.error("--model is needed, on the command line or in the config file")
    return options


def options_from(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of this script; see `read_flags`."""
    flags = parser()
    options = read_flags(flags, arguments)
    if isinstance(options.prompt, str):
        options.prompt = [options.prompt]
    if not any(options.prompt or ()):
        flags.error("--prompt is needed, on the command line or in the config file")
    if options.repeat < 1:
        flags.error(f"--repeat {options.repeat}: give at least 1")
    return options


def cache_config(options: argparse.Namespace) -> CacheConfig | None:
    """Return the cache that the flags ask for, or None.

    Raises:
        ValueError: contradicting flags, or options that CacheConfig refuses.
    """
    name = options.use_cache if isinstance(options.use_cache, str) else None
    method = options.cache_method
    if method is not None and method not in METHODS:
        raise ValueError(
            f"--cache_method {method} is xDiT's own cache, which this script does not run; use one "
            f"of {', '.join(METHODS)}, or xDiT's examples"
        )
    if name is None and method is None:
        if options.cache_config:
            raise ValueError("--cache_config needs --use_cache NAME or --cache_method fastcache")
        return None
    named = {} if name is None else {"use_cache": name}
    return requested(method or "fastcache", named | read_options(options.cache_config))


def load(options: argparse.Namespace) -> Any:
    """Load the model in xfuser's class, in the layout that the flags ask for."""
    from diffusers import DiffusionPipeline
    from xfuser import xFuserArgs
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    mend_xfuser()
    fast_attn_cache = options.use_cache is True
    engine_config, _ = xFuserArgs.from_cli_args(
        argparse.Namespace(
            **{
                **vars(options),
                "use_cache": fast_attn_cache,
                "cache_method": None,
                "cache_config": None,
            }
        )
    ).create_config()
    on_gpu = cpu_platform.has_accelerator()
    dtype = DTYPES[options.dtype or ("bfloat16" if on_gpu else "float32")]
    pipeline = DiffusionPipeline.from_pretrained(options.model, torch_dtype=dtype)
    cpu_platform.prepare_engine_config(engine_config, pipeline)
    pipe = xFuserPipelineWrapperRegister.get_class(pipeline)(pipeline, engine_config)
    if on_gpu:
        from xfuser.core.distributed import get_world_group

        pipe = pipe.to(f"cuda:{get_world_group().local_rank}")
    return pipe


def call_arguments(pipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, those that its class knows."""
    wanted = {
        "prompt": options.prompt if len(options.prompt) > 1 else options.prompt[0],
        "negative_prompt": options.negative_prompt or None,
        "height": options.height,
        "width": options.width,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "max_sequence_length": options.max_sequence_length,
        "use_resolution_binning": not options.no_use_resolution_binning,
        "output_type": "np",
    }
    known = inspect.signature(type(pipe.module).__call__).parameters
    if wanted["negative_prompt"] is None or "negative_prompt" in known:
        return {k: v for k, v in wanted.items() if v is not None and k in known}
    raise ValueError(f"{type(pipe.module).__name__} takes no --negative_prompt")


class Generator:
    """Runs one pipeline with and without the cache, the same way every time."""

    def __init__(self, pipe: Any, options: argparse.Namespace):
        from xfuser.core.distributed import get_data_parallel_rank, get_world_group

        self.pipe = pipe
        self.arguments = call_arguments(pipe, options)
        self.world = get_world_group()
        # Replicas draw their own noise; ranks of one replica the same.
        self.seed = options.seed + get_data_parallel_rank()

    def run(self, title: str, config: CacheConfig | None = None, **changes: Any) -> Run:
        """Generate once, cached where a config is given; a titled progress bar shows on rank 0."""
        from xfuser_fastcache import (
            apply_cache_on_transformer,
            get_cache_statistics,
            get_cache_trace,
            remove_cache,
        )

        pipe = self.pipe
        pipe.set_progress_bar_config(disable=self.world.rank != 0 or not title, desc=title)
        if config is not None:
            apply_cache_on_transformer(pipe.transformer, config=config, scheduler=pipe.scheduler)
        noise = torch.Generator("cpu").manual_seed(self.seed)
        dist.barrier(group=self.world.cpu_group)
        try:
            with PeakMemory() as memory, DenoisingTimer(pipe) as timer:
                output = pipe(**{**self.arguments, "generator": noise, **changes})
            run = Run(timer.seconds, memory.bytes, [] if output is None else list(output.images))
            if config is not None:
                run.statistics = get_cache_statistics(pipe.transformer)
                run.trace = get_cache_trace(pipe.transformer)
        finally:
            if config is not None:
                remove_cache(pipe.transformer)
        return run

    def gather(self, run: Run | None) -> list[Run | None]:
        """Return every rank's run on rank 0, nothing elsewhere."""
        ranks = dist.get_world_size()
        rows: list[Any] | None = [None] * ranks if self.world.rank == 0 else None
        dist.gather_object(run, rows, dst=0, group=self.world.cpu_group)
        return rows or []


def median_latency(runs: list[list[Run]]) -> float:
    """Median over repeats of the slowest rank's denoising loop, in seconds."""
    return statistics.median(max(run.seconds for run in repeat) for repeat in runs)


def images_of(ranks: list[Run]) -> list[np.ndarray]:
    """The pictures of all replicas, in order."""
    return [image for run in ranks for image in run.images]


def build_report(
    options: argparse.Namespace,
    config: CacheConfig | None,
    baseline: list[list[Run]],
    cached: list[list[Run]],
) -> dict[str, Any]:
    """Return the report on rank 0; see the README for its fields."""
    from importlib.metadata import version

    latency = {
        "baseline": median_latency(baseline) if baseline else None,
        "cached": median_latency(cached) if cached else None,
    }
    both = bool(baseline and cached)
    # A pair that is equal to the bit has no finite ratio; JSON knows none either.
    quality = list(zip(images_of(cached[-1]), images_of(baseline[-1]), strict=True)) if both else []
    ratios = [psnr_db(image, reference) for image, reference in quality]
    finite = [ratio for ratio in ratios if np.isfinite(ratio)]
    last = cached[-1] if cached else []
    stats = last[0].statistics if last else {}

    def peak(runs: list[list[Run]]) -> int | None:
        peaks = [run.peak_bytes for repeat in runs for run in repeat if run.peak_bytes is not None]
        return max(peaks, default=None)

    return {
        "model": options.model,
        "world_size": dist.get_world_size(),
        "parallel": {
            "ulysses": options.ulysses_degree,
            "ring": options.ring_degree,
            "pipefusion": options.pipefusion_parallel_degree,
            "cfg": 2 if options.use_cfg_parallel else 1,
            "data": options.data_parallel_degree,
        },
        "num_inference_steps": options.num_inference_steps,
        "height": options.height,
        "width": options.width,
        "seed": options.seed,
        "prompts": options.prompt,
        "repeat": options.repeat,
        "use_cache": config.use_cache if config else None,
        "cache_config": config.to_dict() if config else None,
        "latency_s": latency,
        "speedup": latency["baseline"] / latency["cached"] if both else None,
        "psnr_db": sum(finite) / len(finite) if finite else None,
        "identical": bool(ratios) and not finite,
        "ssim": float(np.mean([ssim(*pair) for pair in quality])) if quality else None,
        "statistics": stats,
        "decisions_digest": {
            str(rank): run.statistics["decisions_digest"] for rank, run in enumerate(last)
        },
        "collectives_per_step": stats.get("collectives_per_step"),
        "peak_memory_bytes": {"baseline": peak(baseline), "cached": peak(cached)},
        "environment": {
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "xfuser": version("xfuser"),
            "python": platform.python_version(),
            "device": (
                torch.cuda.get_device_name()
                if torch.cuda.is_available()
                else f"CPU, {os.cpu_count()} cores, no GPU"
            ),
        },
    }


def print_table(report: dict[str, Any]) -> None:
    """Print the report's main numbers, and the cache's statistics where one ran."""
    from rich.console import Console
    from rich.table import Table

    def shown(value: float | None, form: str, unit: str = "") -> str:
        return "-" if value is None else format(value, form) + unit

    latency = report["latency_s"]
    layout = " x ".join(f"{k} {v}" for k, v in report["parallel"].items() if v > 1) or "1 rank"
    table = Table(title=f"{report['model']}, {report['num_inference_steps']} steps, {layout}")
    for name in ("", "baseline", report["use_cache"] or "cached"):
        table.add_column(name, justify="left" if not name else "right")
    rows = (
        (
            "denoising loop",
            shown(latency["baseline"], ".3f", " s"),
            shown(latency["cached"], ".3f", " s"),
        ),
        ("speedup", "", shown(report["speedup"], ".2f", "x")),
        (
            "PSNR",
            "",
            "identical" if report["identical"] else shown(report["psnr_db"], ".1f", " dB"),
        ),
        ("SSIM", "", shown(report["ssim"], ".4f")),
        ("hit ratio", "", shown(report["statistics"].get("block_approx_ratio"), ".1%")),
        ("collectives per step", "", shown(report["collectives_per_step"], ".2f")),
    )
    for row in rows:
        table.add_row(*row)
    console = Console(width=100)
    console.print(table)
    if report["statistics"]:
        console.print(statistics_table(report["statistics"]))
    digests = set(report["decisions_digest"].values())
    print(f"{len(report['decisions_digest'])} ranks, {len(digests)} digest(s) of decisions")
    print(f"measured on {report['environment']['device']}, median of {report['repeat']} run(s)")


def picture_of(image: np.ndarray) -> Any:
    """Return an image in [0, 1], `(height, width, 3)`, as an 8-bit PIL picture."""
    from PIL import Image

    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))


def save_pictures(kind: str, images: list[np.ndarray], directory: Path) -> None:
    """Write the pictures as PNG: one by one, and as a grid where there are several."""
    from diffusers.utils import make_image_grid

    pictures = [picture_of(image) for image in images]
    if len(pictures) > 1:
        for index, picture in enumerate(pictures):
            picture.save(directory / f"{kind}_{index}.png")
        columns = next(c for c in range(int(len(pictures) ** 0.5), 0, -1) if len(pictures) % c == 0)
        pictures = [make_image_grid(pictures, columns, len(pictures) // columns)]
    pictures[0].save(directory / f"{kind}.png")


def start() -> None:
    """Make the process a rank, also where torchrun did not start it, and let xfuser run on it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29512")
    cpu_platform.enable_cpu_platform()


def main() -> None:
    """Run what the command line asks for."""
    start()
    options = options_from(sys.argv[1:])
    config = cache_config(options)
    pipe = load(options)
    generator = Generator(pipe, options)
    directory = Path(options.output_dir)
    directory.mkdir(parents=True, exist_ok=True)

    compare = options.baseline or config is None
    generator.run("warm-up", num_inference_steps=min(3, options.num_inference_steps))
    baseline: list[list[Run]] = []
    cached: list[list[Run]] = []
    for repeat in range(options.repeat):
        suffix = f" {repeat + 1}/{options.repeat}" if options.repeat > 1 else ""
        if compare:
            baseline.append(generator.gather(generator.run(f"baseline{suffix}")))
        if config is not None:
            cached.append(generator.gather(generator.run(f"{config.use_cache}{suffix}", config)))
    if dist.get_rank() == 0:
        for kind, runs in (("baseline", baseline), ("cached", cached)):
            if runs:
                save_pictures(kind, images_of(runs[-1]), directory)
        if baseline and cached:
            pictures = images_of(baseline[-1])
            comparison_sheet(
                pictures,
                images_of(cached[-1]),
                # Replicas that share a single prompt draw a picture of it each.
                options.prompt * (len(pictures) // len(options.prompt)),
                directory / "comparison.png",
            )
        report = build_report(options, config, baseline, cached)
        path = Path(options.report or directory / "report.json")
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        print_table(report)
        written = f"pictures in {directory}/, report in {path}"
        if cached:
            run = cached[-1][0]
            write_trace(run.trace, directory / "trace.jsonl")
            save_heat_map(run.trace, list(run.statistics["blocks"]), directory / "heatmap.png")
            written += f", decisions in {directory}/trace.jsonl and {directory}/heatmap.png"
        print(written)
    cpu_platform.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

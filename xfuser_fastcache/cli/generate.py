"""Generate pictures or clips with a step cache, on as many ranks as torchrun starts.

    fastcache generate --model FOLDER_OR_HUB_NAME --prompt "a red ring" --use_cache Fast
    torchrun --nproc_per_node 2 -m xfuser_fastcache.cli generate \\
        --config configs/toy_flux_fast.yaml --ulysses_degree 2 --baseline --output_dir runs/out

Takes all of xDiT's flags. A config file holds flags by their names; the command line wins.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from xfuser_fastcache.cli.flags import progress_flags, progress_of
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.config.mappings import read_mapping
from xfuser_fastcache.reports.clips import (
    are_clips,
    clip_sheet,
    compared_clips,
    difference,
)
from xfuser_fastcache.reports.measured import compared, environment, picture_of
from xfuser_fastcache.reports.mp4 import save_film
from xfuser_fastcache.reports.views import (
    comparison_sheet,
    save_heat_map,
    statistics_table,
    write_trace,
)
from xfuser_fastcache.xdit.asked import read_options
from xfuser_fastcache.xdit.generator import Generator, Run, images_of
from xfuser_fastcache.xdit.integration import METHODS, requested
from xfuser_fastcache.xdit.loaded import (
    DTYPES,
    call_arguments,
    finish,
    load_in_layout,
    start,
    xdit_parser,
)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser for xDiT's flags and those of a run with a cache.

    Args:
        name: of the command.
        description: of it, one line.
    """
    flags = xdit_parser(prog=f"fastcache {name}", description=description)
    ours = flags.add_argument_group("Step cache")
    ours.add_argument("--config", help="YAML or JSON file with flags by name")
    ours.add_argument(
        "--use_cache",
        nargs="?",
        const=True,
        default=False,
        help="backend of the step cache, such as Fast; bare, it is DiTFastAttn's flag",
    )
    ours.add_argument("--dtype", choices=DTYPES, help="default bfloat16, float32 without a GPU")
    pictures = flags.add_argument_group("Pictures and clips")
    pictures.add_argument(
        "--image", metavar="FILE", help="picture to begin with, for pipelines that take one"
    )
    pictures.add_argument(
        "--fps", type=float, default=8.0, help="frames a second of clips (default 8)"
    )
    return flags


def read_flags(flags: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse a command line over the config file it names, and both over what the model brings.

    Returns:
        The flags; their `call` holds arguments of the pipeline's call that no flag can say.

    Raises:
        ValueError: the file does not parse, or holds a key that is no flag.
        SystemExit: a wrong flag, or no model.
    """
    path = flags.parse_args(arguments).config
    given = read_mapping(path) if path else {}
    known = {action.dest for action in flags._actions} - {"help", "config"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"{path}: {', '.join(map(repr, unknown))} is no flag of this command; "
            f"see {flags.prog} --help"
        )
    flags.set_defaults(**given)
    model = flags.parse_args(arguments).model
    if not model:
        flags.error("--model is needed, on the command line or in the config file")
    brought = call_arguments(model)
    binning = brought.pop("use_resolution_binning", True)
    flags.set_defaults(**{"no_use_resolution_binning": not binning, **brought, **given})
    options = flags.parse_args(arguments)
    options.call = {name: value for name, value in brought.items() if name not in known}
    if not options.fps > 0:
        flags.error(f"--fps {options.fps:g}: give more than 0 frames a second")
    if options.image and not Path(options.image).is_file():
        flags.error(f"--image {options.image}: there is no such file")
    return options


def options_from(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of this command; see `read_flags`."""
    flags = parser("generate", __doc__.splitlines()[0])
    ours = flags.add_argument_group("What is drawn")
    ours.add_argument("--baseline", action="store_true", help="also run uncached and compare")
    ours.add_argument("--repeat", type=int, default=1, help="timed runs; medians are reported")
    ours.add_argument("--output_dir", default="runs/generate", help="where pictures go")
    progress_flags(flags)
    ours.add_argument("--report", help="JSON report; default OUTPUT_DIR/report.json")
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
            f"--cache_method {method} is xDiT's own cache, which this command does not run; use "
            f"one of {', '.join(METHODS)}, or xDiT's examples"
        )
    if name is None and method is None:
        if options.cache_config:
            raise ValueError("--cache_config needs --use_cache NAME or --cache_method fastcache")
        return None
    named = {} if name is None else {"use_cache": name}
    try:
        return requested(method or "fastcache", named | read_options(options.cache_config))
    except (TypeError, NotImplementedError) as error:
        raise ValueError(str(error)) from error


def median_latency(runs: list[list[Run]]) -> float:
    """Median over repeats of the slowest rank's denoising loop, in seconds."""
    return statistics.median(max(run.seconds for run in repeat) for repeat in runs)


def build_report(
    options: argparse.Namespace,
    config: CacheConfig | None,
    baseline: list[list[Run]],
    cached: list[list[Run]],
) -> dict[str, Any]:
    """Return the report on rank 0; see the README for its fields."""
    kinds = {"baseline": baseline, "cached": cached}
    latency = {kind: median_latency(runs) if runs else None for kind, runs in kinds.items()}
    both = bool(baseline and cached)
    pairs = [images_of(runs[-1]) if both else [] for runs in (cached, baseline)]
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
        "speedup": median_latency(baseline) / median_latency(cached) if both else None,
        **(compared_clips(*pairs) if are_clips(pairs[0]) else compared(*pairs)),
        "statistics": stats,
        **{f"statistics_{name}": of for name, of in (last[0].others if last else {}).items()},
        "decisions_digest": {
            str(rank): " ".join(
                of["decisions_digest"] for of in (run.statistics, *run.others.values())
            )
            for rank, run in enumerate(last)
        },
        "collectives_per_step": stats.get("collectives_per_step"),
        "peak_memory_bytes": {"baseline": peak(baseline), "cached": peak(cached)},
        "environment": environment("torch", "diffusers", "xfuser"),
    }


def print_table(report: dict[str, Any]) -> None:
    """Print the report's main numbers, and the cache's statistics where one ran."""

    def shown(value: float | None, form: str, unit: str = "") -> str:
        return "-" if value is None else format(value, form) + unit

    latency = report["latency_s"]
    layout = " x ".join(f"{k} {v}" for k, v in report["parallel"].items() if v > 1) or "1 rank"
    table = Table(title=f"{report['model']}, {report['num_inference_steps']} steps, {layout}")
    for name in ("", "baseline", report["use_cache"] or "cached"):
        table.add_column(name, justify="left" if not name else "right")
    psnr = "identical" if report["identical"] else shown(report["psnr_db"], ".1f", " dB")
    rows = (
        ("denoising loop", *(shown(latency[kind], ".3f", " s") for kind in latency)),
        ("speedup", "", shown(report["speedup"], ".2f", "x")),
        ("PSNR", "", psnr),
        ("SSIM", "", shown(report["ssim"], ".4f")),
        *([("flicker", "", shown(report["flicker"], ".4f"))] if "flicker" in report else []),
        *(
            (
                name.replace("statistics", "hit ratio"),
                "",
                shown(of.get("block_approx_ratio"), ".1%"),
            )
            for name, of in report.items()
            if name.startswith("statistics")
        ),
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


def save_pictures(kind: str, images: list[np.ndarray], directory: Path, fps: float) -> None:
    """Write pictures as PNG, one by one and several as a grid too; clips as `save_film` does."""
    from diffusers.utils import make_image_grid

    if are_clips(images):
        for index, clip in enumerate(images):
            save_film([clip], directory / f"{kind}_{index}", fps)
        return
    pictures = [picture_of(image) for image in images]
    if len(pictures) > 1:
        for index, picture in enumerate(pictures):
            picture.save(directory / f"{kind}_{index}.png")
        columns = next(c for c in range(int(len(pictures) ** 0.5), 0, -1) if len(pictures) % c == 0)
        pictures = [make_image_grid(pictures, columns, len(pictures) // columns)]
    pictures[0].save(directory / f"{kind}.png")


def save_comparison(
    baseline: list[np.ndarray],
    cached: list[np.ndarray],
    prompts: list[str],
    directory: Path,
    fps: float,
) -> None:
    """Write baseline, cached and difference: a sheet, for each clip one and a film."""
    if not are_clips(baseline):
        # Replicas that share a single prompt draw a picture of it each.
        captions = prompts * (len(baseline) // len(prompts))
        comparison_sheet(baseline, cached, captions, directory / "comparison.png")
        return
    for index, (before, after) in enumerate(zip(baseline, cached, strict=True)):
        path = directory / f"comparison_{index}"
        clip_sheet(before, after, path.with_suffix(".png"))
        save_film([before, after, difference(before, after)], path, fps)


def main(arguments: list[str]) -> int:
    """Run what the command line asks for; return the exit status."""
    start()
    options = options_from(arguments)
    config = cache_config(options)
    pipe = load_in_layout(options, options.dtype)
    generator = Generator(pipe, options, progress_of(options))
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
                save_pictures(kind, images_of(runs[-1]), directory, options.fps)
        if baseline and cached:
            before, after = images_of(baseline[-1]), images_of(cached[-1])
            save_comparison(before, after, options.prompt, directory, options.fps)
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
    finish()
    return 0

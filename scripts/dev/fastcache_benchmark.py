"""Time a model uncached, with FastCache, with TeaCache and with First-Block-Cache.

    python scripts/fastcache_benchmark.py --model_type flux --repeat 3
    python scripts/fastcache_benchmark.py --model_type flux --model FOLDER_OR_HUB_NAME \\
        --prompt "a beautiful landscape with mountains and a lake" --num_inference_steps 30 \\
        --cache_ratio_threshold 0.05 --analyze_approximation_quality

One process, plain diffusers. All methods take turns; times are of the denoising loop, medians.
scripts/benchmark.py compares more methods, each at several settings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from diffusers_adapters.registry import adapters
from xfuser_fastcache import (
    CacheConfig,
    apply_cache_on_transformer,
    comparison_sheet,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.benchmarks.methods import Changes
from xfuser_fastcache.benchmarks.subject import Sample, Subject
from xfuser_fastcache.benchmarks.worker import PACKAGES, tell
from xfuser_fastcache.calibration.checkout import ROOT
from xfuser_fastcache.cli.flags import flags_of
from xfuser_fastcache.reports.measured import compared, environment
from xfuser_fastcache.xdit.loaded import (
    DTYPES,
    call_arguments,
    known_arguments,
    load_pipeline,
)

# Title -> our backend and its threshold: TeaCache's is the default of xDiT's class,
# First-Block-Cache's of its call.
THRESHOLDS = {"TeaCache": ("Tea", 0.6), "First-Block-Cache": ("Fb", 0.12)}
Prepare = Callable[[], AbstractContextManager[Changes]]


@dataclass
class Column:
    """One column of the table.

    Attributes:
        title: of the method.
        source: whose code runs, and with what threshold.
        prepare: puts the method on; None for the uncached run.
        samples: of all repeats.
        error: its own, where it could not run.
        statistics: of our caches.
    """

    title: str
    source: str
    prepare: Prepare | None
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Median time of the denoising loop."""
        return statistics.median(sample.seconds for sample in self.samples)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    flags = flags_of("scripts/fastcache_benchmark.py", __doc__)
    flags.add_argument("--model_type", choices=sorted(adapters()), default="flux")
    flags.add_argument("--model", help="folder or hub name; default the embedded toy of the type")
    flags.add_argument("--prompt", default="a large red ring, top left, on dark blue")
    flags.add_argument("--num_inference_steps", type=int, default=30)
    flags.add_argument("--seed", type=int, default=42)
    flags.add_argument("--batch_size", type=int, default=1, help="pictures of one call")
    flags.add_argument("--height", type=int)
    flags.add_argument("--width", type=int)
    flags.add_argument("--dtype", choices=DTYPES, help="default bfloat16, float32 without a GPU")
    flags.add_argument("--output_dir", type=Path, default=Path("runs/fastcache_benchmark"))
    flags.add_argument("--repeat", type=int, default=3, help="timed runs of each method")
    flags.add_argument("--cache_ratio_threshold", type=float, default=0.05)
    flags.add_argument("--motion_threshold", type=float)
    flags.add_argument(
        "--analyze_approximation_quality",
        action="store_true",
        help="also compare pictures with the uncached ones, and count what was skipped",
    )
    options = flags.parse_args(arguments)
    for name in ("repeat", "batch_size"):
        if getattr(options, name) < 1:
            flags.error(f"--{name} {getattr(options, name)}: give at least 1")
    return options


def load(options: argparse.Namespace) -> Subject:
    """Load the pipeline.

    Raises:
        ValueError: the model is not of the type that was given.
    """
    model = options.model or str(ROOT / "toys" / options.model_type)
    pipe = load_pipeline(model, options.dtype)
    transformer = getattr(pipe, "transformer", None)
    if transformer is None or not adapters()[options.model_type].supports(transformer):
        raise ValueError(
            f"{model} is a {type(pipe).__name__}, not of --model_type {options.model_type}; "
            f"known types: {', '.join(sorted(adapters()))}"
        )
    sizes = {"height": options.height, "width": options.width}
    call = call_arguments(model) | {name: px for name, px in sizes.items() if px is not None}
    return Subject(pipe, options.num_inference_steps, known_arguments(pipe, call))


def ours(subject: Subject, config: CacheConfig, column: Column) -> Prepare:
    """One of our caches; its statistics go to the column."""

    @contextmanager
    def prepare() -> Iterator[Changes]:
        apply_cache_on_transformer(
            subject.transformer, config=config, scheduler=subject.pipe.scheduler
        )
        try:
            yield {}
            column.statistics = get_cache_statistics(subject.transformer)
        finally:
            remove_cache(subject.transformer)

    return prepare


def fast_config(options: argparse.Namespace) -> CacheConfig:
    """FastCache's options; a motion threshold also leaves static tokens out of the blocks."""
    return CacheConfig(
        use_cache="Fast",
        cache_ratio_threshold=options.cache_ratio_threshold,
        motion_threshold=options.motion_threshold,
    )


def columns_of(subject: Subject, config: CacheConfig) -> list[Column]:
    """The methods of the table, all of them ours."""
    fast = Column(
        "FastCache", f"xfuser-fastcache, threshold {config.cache_ratio_threshold:g}", prepare=None
    )
    fast.prepare = ours(subject, config, fast)
    found = [Column("Baseline", "uncached", None), fast]
    for title, (backend, threshold) in THRESHOLDS.items():
        column = Column(title, f"xfuser-fastcache, threshold {threshold:g}", None)
        own = CacheConfig(use_cache=backend, cache_ratio_threshold=threshold)
        column.prepare = ours(subject, own, column)
        found.append(column)
    return found


def run(column: Column, subject: Subject, prompts: list[str], seeds: list[int]) -> Sample | None:
    """Call the pipeline once with a method; None where it raises, and the column says what."""
    if column.prepare is None:
        return subject.generate(prompts, seeds)
    try:
        with column.prepare() as changes:
            return subject.generate(prompts, seeds, **changes)
    except Exception as error:
        column.error = tell(error)
        return None


def rows_of(columns: list[Column], analyze: bool) -> list[dict[str, Any]]:
    """What was measured, a method a row."""
    base = columns[0]
    rows = []
    for column in columns:
        row: dict[str, Any] = {"method": column.title, "source": column.source}
        if column.error is not None:
            row["error"] = column.error
        else:
            row |= {
                "latency_s": column.seconds,
                "speedup": base.seconds / column.seconds,
                "peak_memory_bytes": max(s.peak_bytes or 0 for s in column.samples) or None,
            }
            if analyze and column is not base:
                row |= {
                    **compared(column.samples[-1].images, base.samples[-1].images),
                    "block_approx_ratio": column.statistics.get("block_approx_ratio"),
                    "spatial_approx_ratio": column.statistics.get("spatial_approx_ratio"),
                }
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]], analyze: bool, console: Console) -> None:
    """Print the table; what could not run stands below it with its own error."""
    table = Table()
    heads = ["method", "denoising loop", "speedup"]
    heads += ["PSNR", "SSIM", "blocks skipped"] if analyze else []
    for head in [*heads, "whose code"]:
        table.add_column(head)
    for row in rows:
        cells = [row["method"], "-", "-"]
        if "error" not in row:
            cells[1:] = [f"{row['latency_s']:.3f} s", f"{row['speedup']:.2f}x"]
        if analyze:
            psnr, skipped = row.get("psnr_db"), row.get("block_approx_ratio")
            same = "identical" if row.get("identical") else "-"
            cells += [
                same if psnr is None else f"{psnr:.1f} dB",
                f"{row['ssim']:.4f}" if "ssim" in row else "-",
                "-" if skipped is None else f"{skipped:.1%}",
            ]
        table.add_row(*cells, row["source"])
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['method']} could not run: {row['error']}", markup=False)


def main(arguments: list[str]) -> int:
    """Measure, print and write; return the exit status."""
    os.environ.setdefault("LOG_LEVEL", "warning")  # xfuser reads it when it is imported
    options = parse(arguments)
    console = Console(width=120)
    try:
        subject = load(options)
        config = fast_config(options)
    except ValueError as error:
        console.print(f"fastcache_benchmark.py: {error}", style="red", markup=False)
        return 2
    columns = columns_of(subject, config)
    prompts = [options.prompt] * options.batch_size
    seeds = [options.seed + i for i in range(options.batch_size)]
    for column in track(columns, "warm-up", console=console):
        run(column, subject, prompts, seeds)
    for _ in track(range(options.repeat), "measuring", console=console):
        for column in columns:
            if column.error is None:
                sample = run(column, subject, prompts, seeds)
                column.samples += [sample] if sample is not None else []
    rows = rows_of(columns, options.analyze_approximation_quality)
    env = environment(*PACKAGES)
    measured = (
        f"{options.model or f'the embedded toy {options.model_type}'}, {options.batch_size} "
        f"picture(s) a call, {options.num_inference_steps} steps, on {env['device']} with "
        f"{env['threads_per_process']} thread(s), torch {env['torch']}, diffusers "
        f"{env['diffusers']}; wall time of the denoising loop, median of {options.repeat} runs in "
        "turn, after a warm-up"
    )
    print_rows(rows, options.analyze_approximation_quality, console)
    console.print(f"Measured: {measured}.", markup=False)
    directory = options.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    report = {"measured": measured, "environment": env, "methods": rows}
    path = directory / "fastcache_benchmark.json"
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    for column in columns[1:]:
        if column.error is None:
            comparison_sheet(
                columns[0].samples[-1].images,
                column.samples[-1].images,
                prompts,
                directory / f"{column.title.lower().replace('-', '_')}.png",
            )
    console.print(f"written: {path} and comparison sheets beside it", markup=False)
    return 0

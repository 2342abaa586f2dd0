"""Measure the cache on your own cards: one model, in your layout, cached against uncached.

    torchrun --nproc_per_node 8 -m xfuser_fastcache.cli fieldtest \\
        --model black-forest-labs/FLUX.1-dev --ulysses_degree 8
    fastcache fieldtest --model FOLDER_OR_HUB_NAME --enable_group_cpu_offload

Takes all of xDiT's flags, as generate does. The file holds no prompt, no picture and no path, and
at any time what was measured so far; it can be attached to a public issue.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xfuser_fastcache.calibration.prompts import AUDIT, prompts_for
from xfuser_fastcache.cli.generate import cache_config, parser, read_flags
from xfuser_fastcache.xdit.loaded import finish, start

# Flags with a text that is no one's secret.
_TOLD = {"attention_backend", "dtype", "quantization", "gemm_quantization", "split_scheme"}
# A mask computes the first and the last step, and has to leave others to skip.
_FEWEST_STEPS = 5


def options_from(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the command line over the config file it names.

    Returns:
        The flags, with prompts; and those that were given and may be told.

    Raises:
        ValueError: the file does not parse, or holds a key that is no flag.
        SystemExit: a wrong flag.
    """
    flags = parser("fieldtest", __doc__.splitlines()[0])
    ours = flags.add_argument_group("Field test")
    ours.add_argument("--output", type=Path, default=Path("runs/fieldtest.json"), help="JSON file")
    ours.add_argument("--budget_s", type=float, default=600.0, help="seconds, loading included")
    ours.add_argument("--rounds", type=int, default=3, help="of interleaved generations, at most")
    plain = {action.dest: action.default for action in flags._actions}
    options = read_flags(flags, arguments)
    if options.num_inference_steps < _FEWEST_STEPS or options.rounds < 1 or options.budget_s <= 0:
        flags.error(
            f"give at least {_FEWEST_STEPS} --num_inference_steps, 1 of --rounds and a --budget_s "
            "above 0"
        )
    if isinstance(options.prompt, str):
        options.prompt = [options.prompt]
    if not any(options.prompt):
        options.prompt = prompts_for(options.model, AUDIT, 1, seed=0)
    given = {
        name: value if isinstance(value, (bool, int, float)) else str(value)
        for name, value in vars(options).items()
        if name in plain
        and value != plain[name]
        and (isinstance(value, (bool, int, float)) or name in _TOLD)
    }
    return options, given


def print_table(report: dict[str, Any]) -> None:
    """Print a row a variant, and what was not measured."""
    table = Table(title=f"{report['device']}, {report['layout']['ranks']} rank(s)")
    heads = ("", "ms a step", "speedup", "skipped", "PSNR, dB", "SSIM", "peak, GiB", "digests")
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    console = Console(width=110)
    missing = []
    for cell in report["cells"]:
        figures = cell["figures"]
        if cell["status"] != "ok":
            reason = cell["reason"].strip().splitlines()[-1]
            missing.append(f"{cell['variant']}, {cell['cell']}: {cell['status']}: {reason}")
        elif cell["cell"] == "speed":
            peaks = [peak for peak in figures["peak_bytes_of_each_rank"] if peak is not None]
            agree = {True: "agree", False: "DIFFER", None: ""}[figures.get("digests_agree")]
            psnr = "identical" if figures.get("identical") else _shown(figures, "psnr_db", ".1f")
            table.add_row(
                cell["variant"],
                f"{figures['ms_a_step']:.1f}",
                _shown(figures, "speedup", ".2f"),
                _shown(figures, "share_skipped", ".0%"),
                psnr,
                _shown(figures, "ssim", ".4f"),
                f"{max(peaks) / 2**30:.2f}" if peaks else "",
                agree,
            )
    console.print(table)
    for line in missing:
        console.print(line, markup=False, soft_wrap=True)


def _shown(figures: dict[str, Any], name: str, form: str) -> str:
    value = figures.get(name)
    return "" if value is None else format(value, form)


def main(arguments: list[str]) -> int:
    """Measure on all ranks.

    Returns:
        0, or 1 where the model could not be loaded or a cell ended with an error.
    """
    start()
    options, given = options_from(arguments)
    config = cache_config(options)
    from xfuser_fastcache.benchmarks.field.run import Plan, default_configs, run
    from xfuser_fastcache.benchmarks.field.schema import errors_of

    configs = {"yours": config} if config else default_configs(options.num_inference_steps)
    plan = Plan(options, given, configs, options.rounds, options.budget_s, options.output)
    well = run(plan)
    if os.environ["RANK"] == "0":
        report = json.loads(options.output.read_text(encoding="utf-8"))
        wrong = errors_of(report)
        if wrong:
            raise RuntimeError(f"{options.output} must not be published: {'; '.join(wrong[:3])}")
        print_table(report)
        print(f"report in {options.output}; docs/fieldtest.md says how to read and publish it")
    finish()
    return 0 if well else 1

"""The flags of commands that record generations, and the prompts that these are drawn from."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xfuser_fastcache.calibration.options import RunOptions
from xfuser_fastcache.calibration.prompts import prompts_for, read_prompts
from xfuser_fastcache.calibration.runs import Runs
from xfuser_fastcache.cli.flags import flags_of, progress_flags
from xfuser_fastcache.xdit.loaded import (
    DTYPES,
    call_arguments,
    finish,
    load_in_layout,
    start,
    xdit_parser,
)


def recording_flags(
    name: str, description: str, num_prompts: int | None = None, default: str = ""
) -> argparse.ArgumentParser:
    """Return a parser with what every recording needs.

    Args:
        name: of the command.
        description: of it.
        num_prompts: generations where the user does not say it; None where `prompts_of` is told.
        default: that number in words.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read as transformers is imported
    flags = flags_of(f"fastcache {name}", description)
    flags.add_argument("--model", required=True, help="a diffusers folder or hub name")
    flags.add_argument("--prompts", type=Path, help="a file, one a line; default: shipped ones")
    flags.add_argument(
        "--num_prompts",
        type=int,
        default=num_prompts,
        help=f"generations (default {default or num_prompts})",
    )
    flags.add_argument("--seed", type=int, default=0, help="of prompts and noise (default 0)")
    flags.add_argument("--num_inference_steps", type=int, default=28)
    flags.add_argument("--call", type=json.loads, help="JSON: arguments of the pipeline's call")
    flags.add_argument("--dtype", choices=DTYPES, help="default bfloat16, float32 without a GPU")
    progress_flags(flags)
    return flags


def parse_in_layout(
    flags: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, argparse.Namespace | None]:
    """Read the command line: the command's flags, and under torchrun xDiT's beside them.

    Returns:
        The command's options, and xDiT's; None in one process, which takes none of them.
    """
    options, rest = flags.parse_known_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if rest:
            flags.error(
                f"unrecognized arguments: {' '.join(rest)}; xDiT's flags of a layout are for the "
                "ranks that torchrun starts: torchrun --nproc_per_node=N -m xfuser_fastcache.cli"
            )
        return options, None
    start()
    xdits = xdit_parser(prog=flags.prog, description="xDiT's flags")
    xdits.add_argument("--use_cache", help=argparse.SUPPRESS)
    call = {**call_arguments(options.model), **(options.call or {})}
    sizes = {name: call[name] for name in ("height", "width") if name in call}
    xdits.set_defaults(model=options.model, **sizes)
    steps = f"--num_inference_steps={options.num_inference_steps}"
    return options, xdits.parse_args([*rest, steps])


@contextmanager
def runs_of(
    options: RunOptions, layout: argparse.Namespace | None, prompts: list[str]
) -> Iterator[Runs]:
    """Lend the pipeline's runs, in the layout that xDiT's flags ask for; ranks leave together."""
    if layout is None:
        yield Runs(options, prompts)
        return
    yield Runs(options, prompts, load_in_layout(layout, options.dtype))
    finish()


def prompts_of(options: argparse.Namespace, use: str, needed: int = 0) -> list[str]:
    """Return the prompts of the generations.

    Args:
        options: the flags.
        use: see `prompts_for`.
        needed: how many, where neither --num_prompts nor a file says it.

    Raises:
        ValueError: there are fewer.
    """
    if options.prompts is not None:
        return read_prompts(options.prompts, options.num_prompts)
    return prompts_for(options.model, use, options.num_prompts or needed, options.seed)


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report as JSON, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

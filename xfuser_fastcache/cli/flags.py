"""The parser that a command begins with."""

from __future__ import annotations

import argparse
from typing import Any

from xfuser_fastcache.reports.progress import STYLES, Progress


def flags_of(program: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return an empty parser that shows its description as it is written.

    Args:
        program: as users type it, such as "fastcache audit".
        description: the module's docstring.
        **options: others of argparse.
    """
    shown = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=program, description=description, formatter_class=shown, **options
    )


def progress_flags(flags: argparse.ArgumentParser) -> None:
    """Add what says how progress is shown; `progress_of` reads it."""
    flags.add_argument(
        "--progress",
        choices=STYLES,
        default="auto",
        help="on standard error: a bar, lines, a JSON object a line, or nothing; default a bar on "
        "a terminal, else lines",
    )
    flags.add_argument(
        "--quiet", action="store_const", const="none", dest="progress", help="--progress none"
    )


def progress_of(options: argparse.Namespace, shown: bool = True) -> Progress:
    """Return the progress that the flags ask for; nothing on a rank that does not show it."""
    return Progress(options.progress if shown else "none")

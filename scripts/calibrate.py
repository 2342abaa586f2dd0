#!/usr/bin/env python3
"""`fastcache calibrate` in a checkout; with `--audit FILE`, `fastcache audit FILE`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser_fastcache.cli import main


def command_of(arguments: list[str]) -> list[str]:
    """Return the command that the script's flags stand for."""
    for place, flag in enumerate(arguments):
        if flag == "--audit":
            return ["audit", *arguments[:place], *arguments[place + 1 :]]
        if flag.startswith("--audit="):
            file = flag.removeprefix("--audit=")
            return ["audit", file, *arguments[:place], *arguments[place + 1 :]]
    return ["calibrate", *arguments]


if __name__ == "__main__":
    sys.exit(main(command_of(sys.argv[1:])))

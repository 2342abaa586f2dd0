"""The command `fastcache`: one name for the package's programs."""

from __future__ import annotations

import sys
from importlib import import_module

# Name -> (module with `main(arguments) -> int`, one line of help). Imported when it is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "bench-gpu": ("xfuser_fastcache.cli.bench_gpu", "measure costs and gains on one GPU"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {text}" for name, (_, text) in sorted(COMMANDS.items())]
    lines = ["usage: fastcache COMMAND [ARGUMENTS]", "", *rows, ""]
    return "\n".join([*lines, "fastcache COMMAND --help says what a command takes."])


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: its name and what it takes; those of the process by default.

    Returns:
        The exit status: the command's own, 2 where none was named.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        return import_module(COMMANDS[given[0]][0]).main(given[1:])
    if given and given[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if given:
        print(f"fastcache: there is no command {given[0]!r}", file=sys.stderr)
    print(_usage(), file=sys.stderr)
    return 2

"""The command `fastcache`: one name for the package's programs."""

from __future__ import annotations

import sys
from importlib import import_module

# Name -> (module with `main(arguments) -> int`, one line of help). Imported when it is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("xfuser_fastcache.cli.generate", "draw pictures with a step cache, on any ranks"),
    "calibrate": ("xfuser_fastcache.cli.calibrate", "fit a cache to one model and scheduler"),
    "audit": ("xfuser_fastcache.cli.audit", "measure how often a calibration skips wrongly"),
    "inspect": ("xfuser_fastcache.cli.inspect", "say what a calibration or maps hold and cover"),
    "fit-maps": ("xfuser_fastcache.cli.fit_maps", "fit linear maps of the stack of blocks"),
    "fit-polynomial": ("xfuser_fastcache.cli.fit_polynomial", "fit TeaCache's polynomial"),
    "bench": ("xfuser_fastcache.cli.bench", "compare caches, and fewer steps, on one model"),
    "bench-gpu": ("xfuser_fastcache.cli.bench_gpu", "measure costs and gains on one GPU"),
    "fieldtest": (
        "xfuser_fastcache.cli.fieldtest",
        "measure a cache on your own cards, to publish",
    ),
    "serve": ("xfuser_fastcache.cli.serve", "serve pictures over HTTP, on any ranks"),
    "layouts": ("xfuser_fastcache.cli.layouts", "run the embedded toys in every layout"),
    "chaos": ("xfuser_fastcache.cli.chaos", "break things on purpose and see what gets through"),
    "models": ("xfuser_fastcache.cli.models", "say which models it runs on, where, and why not"),
    "toys": ("xfuser_fastcache.cli.toys", "write the toy models, from a checkout or an sdist"),
    "doctor": ("xfuser_fastcache.cli.doctor", "say what is installed, registered and refused"),
}


# Module -> the extra that brings it.
EXTRAS = {"fastapi": "serve", "uvicorn": "serve", "prometheus_client": "serve"}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    lines = ["usage: fastcache COMMAND [ARGUMENTS]", "", *rows, ""]
    return "\n".join([*lines, "fastcache COMMAND --help says what a command takes."])


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: its name and what it takes; those of the process by default.

    Returns:
        The exit status: the command's own; 2 where none was named, or where it cannot do what it
        was asked for, which it says in a line.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        try:
            return import_module(COMMANDS[given[0]][0]).main(given[1:])
        except (ValueError, OSError) as error:
            said = str(error)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            said = f'{error}; pip install "xfuser-fastcache[{EXTRAS[error.name]}]"'
        print(f"fastcache {given[0]}: {' '.join(said.split())}", file=sys.stderr)
        return 2
    if given and given[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if given:
        print(f"fastcache: there is no command {given[0]!r}", file=sys.stderr)
    print(_usage(), file=sys.stderr)
    return 2

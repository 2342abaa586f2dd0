"""`fastcache fieldtest` on this rank; `FAULT` in the environment plants one, and hurries."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from xfuser_fastcache import cli

FAULT = os.environ.get("FAULT")


def planted(original: Any) -> Any:
    """Return `Generator.run` with the fault in its second cached generation."""
    cached = []

    @functools.wraps(original)
    def run(self: Any, title: str, config: Any = None, **changes: Any) -> Any:
        if config is not None:
            cached.append(title)
        if len(cached) == 2 and FAULT == "alone" and self.world.rank == 1:
            raise RuntimeError("this rank is out of memory")
        return original(self, title, config, **changes)

    return run


def main() -> int:
    """Run the command."""
    if FAULT:
        from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform

        enable_cpu_platform()
        from xfuser_fastcache.benchmarks.field import run
        from xfuser_fastcache.xdit.generator import Generator

        Generator.run = planted(Generator.run)
        run.Together = functools.partial(run.Together, patience_s=2.0)
    return cli.main(["fieldtest", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Print how large the rooms are, and what is larger than it should be.

    python scripts/dev/sizes.py

Exits with status 1 where a limit is passed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "xfuser_fastcache"
COUNTED = ("xfuser_fastcache", "scripts", "toys/training")
# What the package and scripts could not do then.
ADDED = (
    "xfuser_fastcache/benchmarks/field",
    "xfuser_fastcache/benchmarks/gpu",
    "xfuser_fastcache/chaos",
    "xfuser_fastcache/cli/bench_gpu.py",
    "xfuser_fastcache/cli/chaos.py",
    "xfuser_fastcache/cli/doctor.py",
    "xfuser_fastcache/cli/fieldtest.py",
    "xfuser_fastcache/xdit/gloo_waits.py",
    "xfuser_fastcache/xdit/weights.py",
    "scripts/dev/_fabric.py",
    "scripts/dev/_ranks.py",
    "scripts/dev/scale.py",
    "scripts/dev/sizes.py",
    "scripts/dev/skipped.py",
    "scripts/dev/unchanged.py",
)
# Files with a limit of their own, in lines.
LIMITS = {"engine.py": 300, "decisions/policy.py": 200, "config/cache_config.py": 300}
FILE_LIMIT = 400
# Of a class that acts; plain records may take more.
ARGUMENTS = 6
# Lines of package and scripts before the redesign that this command came with.
BEFORE = 21_105


def lines_of(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def sources(*folders: str) -> Iterator[Path]:
    """Yield all Python files below some folders of the repository."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def counted() -> dict[str, int]:
    """Return the lines of each counted folder, without what was added."""
    added = tuple(str(ROOT / name) for name in ADDED)
    return {
        folder: sum(lines_of(p) for p in sources(folder) if not str(p).startswith(added))
        for folder in COUNTED
    }


def constructors(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the classes of a file that write their own constructor, with its arguments' number."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef):
            continue
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                found = part.args
                yield node.name, len(found.args) + len(found.kwonlyargs) - 1


def complaints() -> list[str]:
    """Return a line for each limit that is passed."""
    found = []
    for path in sources("xfuser_fastcache", "diffusers_adapters"):
        name = str(path.relative_to(ROOT))
        limit = LIMITS.get(str(path.relative_to(PACKAGE)) if PACKAGE in path.parents else "")
        lines = lines_of(path)
        if lines >= (limit or FILE_LIMIT + 1):
            found.append(f"{name}: {lines} lines; give it fewer than {limit or FILE_LIMIT + 1}")
        for kind, arguments in constructors(path):
            if arguments > ARGUMENTS:
                found.append(f"{name}: {kind} takes {arguments} arguments; at most {ARGUMENTS}")
    total = sum(counted().values())
    if total >= BEFORE:
        found.append(f"{', '.join(COUNTED)}: {total} lines; give them fewer than {BEFORE}")
    return found


def main() -> int:
    """Print the sizes; return the exit status."""
    sizes = counted()
    for folder, lines in sizes.items():
        print(f"{lines:6}  {folder}, for what it did before")
    print(f"{sum(sizes.values()):6}  together (below {BEFORE})")
    for name in LIMITS:
        print(f"{lines_of(PACKAGE / name):6}  xfuser_fastcache/{name} (below {LIMITS[name]})")
    longest = max(sources("xfuser_fastcache", "diffusers_adapters"), key=lines_of)
    print(f"{lines_of(longest):6}  longest: {longest.relative_to(ROOT)} (at most {FILE_LIMIT})")
    most = max(
        ((n, kind) for path in sources("xfuser_fastcache") for kind, n in constructors(path)),
        default=(0, ""),
    )
    print(f"{most[0]:6}  most arguments of a constructor: {most[1]} (at most {ARGUMENTS})")
    found = complaints()
    print("\n".join(found) if found else "every limit holds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

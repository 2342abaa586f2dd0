"""Say what is installed and registered here, and what would be refused and why.

    fastcache doctor
    fastcache doctor --json

Loads every plug-in by itself: one that fails is listed with its error, and the exit status is 1.
Where all load, the models follow, as `fastcache models` lists them.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from xfuser_fastcache.backends import BACKENDS, FORECASTERS
from xfuser_fastcache.calibration.checkout import toys_of_checkout
from xfuser_fastcache.cli import models
from xfuser_fastcache.cli.flags import flags_of
from xfuser_fastcache.plugins import everything_registered
from xfuser_fastcache.xdit.compat import (
    INSTALL,
    IncompatibleXfuserError,
    check_xfuser_version,
    has_accelerator,
)
from xfuser_fastcache.xdit.points import integration_rows, probed

OURS = "xfuser-fastcache"
PACKAGES = (
    *(OURS, "torch", "triton", "diffusers", "transformers", "xfuser", "yunchang"),
    *("flash-attn", "cache-dit", "ray"),
)
# Module -> what needs it, and the extra that installs it.
EXTRAS = {
    "fastapi": ("fastcache serve", "serve"),
    "prometheus_client": ("fastcache serve", "serve"),
    "av": ("clips as mp4", "video"),
    "cache_dit": ("the methods cache-dit-* of fastcache bench", "bench"),
    "ray": ("xDiT's Ray workers", "ray"),
    "flash_attn": ("xDiT's ring attention on GPUs other than by torch's kernels", "flash-attn"),
}


def versions() -> dict[str, str | None]:
    """Return the version of everything that matters; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = distribution(name).version
        except PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[str]:
    """Return the devices by name: GPUs, then the host."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [*gpus, f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"]


def registered() -> list[dict[str, str]]:
    """Return what is registered, each with its group, package and error; "" where it loads."""
    rows = [
        {"group": group, "name": name, "object": "", "package": OURS, "error": ""}
        for group, table in (("backends", BACKENDS), ("forecasters", FORECASTERS))
        for name in table
    ]
    seen: dict[tuple[str, str], str] = {}
    for entry in _entries():
        known = seen.setdefault((entry.group, entry.name), entry.value)
        error = _error_of(entry) if known == entry.value else f"the name is taken by {known}"
        rows.append(
            {
                "group": entry.group.removeprefix("xfuser_fastcache."),
                "name": entry.name,
                "object": entry.value,
                "package": entry.dist.name if entry.dist is not None else OURS,
                "error": error,
            }
        )
    return rows


def _entries() -> Iterator[EntryPoint]:
    """Yield the entry points of all our groups, and of groups that only the package itself fills.

    Not by `everything_registered` alone, which refuses a name that is there twice.
    """
    found = set()
    for group in sorted(entry_points().groups):
        if group.startswith("xfuser_fastcache."):
            for entry in entry_points(group=group):
                found.add((group, entry.name))
                yield entry
    try:
        known = everything_registered()
    except ValueError:
        return
    for group, entries in known.items():
        yield from (entry for name, entry in entries.items() if (group, name) not in found)


def _error_of(entry: EntryPoint) -> str:
    try:
        entry.load()
    except Exception as error:  # a broken plug-in must not hide the others
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def refusals() -> list[dict[str, str]]:
    """Return what would be refused here: what, why, and how it is mended."""
    found = []

    def refuse(what: str, why: str, mend: str) -> None:
        found.append({"what": what, "why": why, "mend": mend})

    try:
        check_xfuser_version()
    except IncompatibleXfuserError as error:
        refuse("every layout of xDiT", str(error), INSTALL)
    if not has_accelerator():
        refuse(
            "import xfuser",
            "there is no accelerator, and xfuser does not import without one",
            "call xfuser_fastcache.xdit.cpu_platform.enable_cpu_platform() before the import; the "
            "commands generate, serve and bench do it by themselves",
        )
    if not torch.cuda.is_available():
        refuse('sync_backend="nccl"', "there is no CUDA device", 'use sync_backend="gloo"')
        refuse("fastcache bench-gpu", "there is no GPU", "fastcache bench-gpu --small rehearses it")
    for module, (what, extra) in EXTRAS.items():
        if find_spec(module) is None:
            refuse(what, f"{module} is not installed", f'pip install "{OURS}[{extra}]"')
    if toys_of_checkout() is None:
        refuse(
            "fastcache layouts",
            "the embedded toys are not installed with the package",
            "run it in a checkout of the project",
        )
    return found


def integration() -> list[dict[str, str]]:
    """Return the places in xfuser that are changed, with what is missing there; none without it."""
    try:
        check_xfuser_version()
        return integration_rows(probed())
    except IncompatibleXfuserError:
        return []


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report as tables."""
    table = Table("package", "version", title="versions")
    for name, version in report["versions"].items():
        table.add_row(name, version or "not installed")
    console.print(table)
    heads = ("group", "name", "package")
    table = Table(*heads, title="registered")
    for row in report["registered"]:
        table.add_row(*(row[head] for head in heads))
    console.print(table)
    lines = [f"device: {device}" for device in report["devices"]]
    lines += [
        f"does not load: {row['group']} {row['name']} of {row['package']}, {row['object']}: "
        f"{row['error']}"
        for row in report["registered"]
        if row["error"]
    ]
    places = report["integration"]
    found = [row for row in places if not row["missing"]]
    if places:
        lines.append(f"xfuser: {len(found)} of {len(places)} places that are changed are there")
    lines += [
        f"does not work: {row['brings']}: {row['module']} lacks {row['missing']}"
        for row in places
        if row["missing"]
    ]
    lines += [f"refused: {row['what']}: {row['why']}; {row['mend']}" for row in report["refused"]]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if report["models"]:
        models.show(report["models"], console)


def main(arguments: list[str]) -> int:
    """Report; return 1 where something that is registered does not load, else 0."""
    flags = flags_of("fastcache doctor", __doc__)
    flags.add_argument("--json", action="store_true", help="print one object of JSON")
    given = flags.parse_args(arguments)
    report: dict[str, Any] = {
        "versions": versions(),
        "devices": devices(),
        "registered": registered(),
        "integration": integration(),
        "refused": refusals(),
    }
    broken = any(row["error"] for row in report["registered"])
    report["models"] = [] if broken else models.rows()
    if given.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, Console())
    return int(broken)

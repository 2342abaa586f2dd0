"""What a report looks like, as a check that needs no other package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xfuser_fastcache.benchmarks.gpu.record import ERROR, LEFT_OUT, OK, SCHEMA

_NUMBER = (int, float)
HEAD: dict[str, Any] = {
    "schema": int,
    "command": str,
    "small": bool,
    "steps": int,
    "device": str,
    "machine": dict,
    "families": dict,
    "budget_s": _NUMBER,
    "spent_s": _NUMBER,
    "finished": bool,
    "cells": list,
}
CELL: dict[str, Any] = {
    "family": str,
    "cell": str,
    "variant": str,
    "status": str,
    "reason": (str, type(None)),
    "at_s": _NUMBER,
    "figures": dict,
}
MACHINE = ("driver", "cuda", "torch", "python")
# What a measured cell holds at least.
FIGURES: dict[str, tuple[str, ...]] = {
    "speed": ("ms_a_step", "ms_of_each_run", "repeats_to_the_bit", "finite"),
    "compiled speed": ("ms_a_step", "ms_of_each_run"),
    "identity": ("identical_to_uncached",),
    "digest": ("digest_repeats", "repeats_to_the_bit"),
    "memory": ("peak_bytes", "added_bytes"),
    "synchronisations": ("in_a_later_step", "places"),
    "moments": ("measure_us", "shape"),
    "toy": ("threshold_0_identical", "digest_repeats", "psnr_db"),
    "consensus": ("ranks",),
}


@dataclass(frozen=True)
class Shape:
    """What a report of one command holds.

    Attributes:
        version: of it.
        head: types by key.
        statuses: that its cells may have.
        figures: what a measured cell holds at least, by the cell's name.
    """

    version: int
    head: dict[str, Any]
    statuses: tuple[str, ...]
    figures: dict[str, tuple[str, ...]]


GPU = Shape(SCHEMA, HEAD, (OK, ERROR, LEFT_OUT), FIGURES)


def errors_of(report: Any, shape: Shape = GPU) -> list[str]:
    """Return what is wrong with a report; nothing where it is well formed.

    Example:
        >>> errors_of({"schema": 0})[0]
        'schema is 0, this version reads 1'
    """
    if not isinstance(report, dict):
        return [f"a report is a mapping, not {type(report).__name__}"]
    found = []
    if report.get("schema") != shape.version:
        found.append(f"schema is {report.get('schema')}, this version reads {shape.version}")
    found += _wrong(report, shape.head, "the report")
    if found:
        return found
    found += [f"machine has no {key}" for key in MACHINE if key not in report["machine"]]
    seen = set()
    for index, cell in enumerate(report["cells"]):
        place = f"cell {index}"
        wrong = _wrong(cell, CELL, place)
        if wrong:
            found += wrong
            continue
        name = (cell["family"], cell["cell"], cell["variant"])
        place = "/".join(name)
        if name in seen:
            found.append(f"{place} stands there twice")
        seen.add(name)
        if cell["status"] not in shape.statuses:
            found.append(f"{place} has the unknown status {cell['status']!r}")
        elif (cell["status"] == OK) == bool(cell["reason"]):
            found.append(f"{place} is {cell['status']!r} with the reason {cell['reason']!r}")
        if cell["status"] == OK and cell["variant"] != "first block's changes":
            wanted = shape.figures.get(cell["cell"], ())
            found += [f"{place} has no {key}" for key in wanted if key not in cell["figures"]]
    return found


def joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one report of several that were measured on the same device.

    Args:
        reports: well formed; a cell that several have is the first one's.

    Raises:
        ValueError: they are of different devices, versions, steps or sizes.
    """
    first = reports[0]
    for key in ("device", "machine", "steps", "small"):
        given = [report[key] for report in reports]
        if any(value != given[0] for value in given):
            raise ValueError(f"reports to join differ in {key}: {given}")
    cells: dict[tuple[str, str, str], dict[str, Any]] = {}
    families: dict[str, str] = {}
    for report in reports:
        families |= report["families"]
        for cell in report["cells"]:
            cells.setdefault((cell["family"], cell["cell"], cell["variant"]), cell)
    return {
        **first,
        "command": "\n".join(report["command"] for report in reports),
        "families": families,
        "budget_s": sum(report["budget_s"] for report in reports),
        "spent_s": round(sum(report["spent_s"] for report in reports), 1),
        "finished": all(report["finished"] for report in reports),
        "cells": list(cells.values()),
    }


def _wrong(mapping: Any, types: dict[str, Any], place: str) -> list[str]:
    if not isinstance(mapping, dict):
        return [f"{place} is no mapping"]
    return [
        f"{place} has no {key}" if key not in mapping else f"{place}: {key} is {mapping[key]!r}"
        for key, kind in types.items()
        if not isinstance(mapping.get(key, ...), kind)
    ]

"""What a field test's report looks like, and that it tells nothing that it must not."""

from __future__ import annotations

from typing import Any

from xfuser_fastcache.benchmarks.field.run import SCHEMA
from xfuser_fastcache.benchmarks.field.scrubbing import ADDRESS, PATH
from xfuser_fastcache.benchmarks.field.together import REFUSED
from xfuser_fastcache.benchmarks.gpu import schema
from xfuser_fastcache.benchmarks.gpu.record import ERROR, LEFT_OUT, OK

_NUMBER = (int, float)
HEAD: dict[str, Any] = {
    "schema": int,
    "command": str,
    "device": str,
    "machine": dict,
    "model": (str, type(None)),
    "layout": dict,
    "flags": dict,
    "prompts": int,
    "configs": dict,
    "budget_s": _NUMBER,
    "spent_s": _NUMBER,
    "finished": bool,
    "cells": list,
}
FIGURES: dict[str, tuple[str, ...]] = {
    "load": ("transformer", "formats_of_each_rank", "backend_of_each_rank"),
    "speed": ("ms_a_step", "seconds_of_each_run", "peak_bytes_of_each_rank", "finite"),
}
# Of a variant that is cached.
CACHED = ("speedup", "share_skipped", "psnr_db", "ssim", "digest_of_each_rank", "digests_agree")
SHAPE = schema.Shape(SCHEMA, HEAD, (OK, ERROR, LEFT_OUT, REFUSED), FIGURES)


def errors_of(report: Any) -> list[str]:
    """Return what is wrong with a report; nothing where it is well formed and may be published.

    Example:
        >>> errors_of({"schema": 2})[0]
        'schema is 2, this version reads 1'
    """
    found = schema.errors_of(report, SHAPE)
    if found:
        return found
    for cell in report["cells"]:
        if cell["cell"] == "speed" and cell["status"] == OK and cell["variant"] != "uncached":
            missing = [key for key in CACHED if key not in cell["figures"]]
            found += [f"{cell['variant']} has no {key}" for key in missing]
    return found + [
        f"{place} tells a path or an address: {text!r}" for place, text in _told(report)
    ]


def _told(value: Any, place: str = "the report") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for key, entry in value.items() for row in _told(entry, f"{place}.{key}")]
    if isinstance(value, list):
        return [row for i, entry in enumerate(value) for row in _told(entry, f"{place}[{i}]")]
    bad = isinstance(value, str) and (PATH.search(value) or ADDRESS.search(value))
    return [(place, value)] if bad else []

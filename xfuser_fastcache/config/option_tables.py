"""The tables of options in docs/configuration.md, from the code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.config.checks import options_of
from xfuser_fastcache.config.methods import REGISTRIES
from xfuser_fastcache.plugins import BUILT_IN, GATES


def options_table() -> str:
    """Return the table of what belongs to all methods, in Markdown."""
    head = ("option", "type", "default", "allowed", "meaning")
    return _table(head, (_cells(found) for found in options_of(CacheConfig).values()))


def methods_table() -> str:
    """Return the table of the options that the methods of this package own, in Markdown."""
    head = ("method", "option", "type", "default", "allowed", "meaning")
    rows = (
        (f"{kind} `{name}`", *_cells(found))
        for kind, registry in REGISTRIES.items()
        for name in BUILT_IN[registry.group]
        for found in options_of(registry[name]).values()
    )
    return _table(head, rows)


def backends_table() -> str:
    """Return the table of what each backend brings beside its gate, in Markdown."""
    found = {name: GATES[name].companions for name in BUILT_IN[GATES.group]}
    head = ("backend", *(f"`{name}`" for name in found["Fast"]._fields))
    cells = {name: ("" if v is None else f"`{v!r}`" for v in row) for name, row in found.items()}
    return _table(head, ((f"`{name}`", *row) for name, row in cells.items()))


def _cells(found: dataclasses.Field[Any]) -> tuple[str, ...]:
    meta = found.metadata
    flat = f" (flat: `{meta['flat']}`)" if "flat" in meta else ""
    default = meta["none"] if found.default is None and meta["none"] else f"`{found.default!r}`"
    name, kind = f"`{found.name}`{flat}", f"`{found.type}`"
    return name, kind, default, meta["allowed"], meta["meaning"]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head)]
    lines += [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join(" | ".join(("", *line, "")).strip() + "\n" for line in lines)

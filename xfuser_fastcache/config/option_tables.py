"""The tables of options in docs/configuration.md, from the code."""

from __future__ import annotations

import dataclasses

from xfuser_fastcache.config import published
from xfuser_fastcache.config.cache_config import CacheConfig


def options_table() -> str:
    """Return the table of all options in Markdown, as docs/configuration.md holds it."""
    rows = ["| option | type | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    for option in dataclasses.fields(CacheConfig):
        meta = option.metadata
        default = "the backend's" if meta.get("published") else f"`{option.default!r}`"
        meta_cells = (meta["allowed"], meta["meaning"])
        cells = (f"`{option.name}`", f"`{option.type}`", default, *meta_cells)
        rows.append(" | ".join(("", *(cell.replace("|", "\\|") for cell in cells), "")).strip())
    return "\n".join(rows) + "\n"


def defaults_table() -> str:
    """Return each backend's own defaults in Markdown, as docs/configuration.md holds them."""
    names = [o.name for o in dataclasses.fields(CacheConfig) if o.metadata.get("published")]
    rows = [
        " | ".join(("| backend", *(f"`{name}`" for name in names))) + " |",
        "| --- " * (1 + len(names)) + "|",
    ]
    for backend in published.DEFAULTS:
        config = CacheConfig(use_cache=backend)
        values = (getattr(config, name) for name in names)
        cells = ("" if value is None else f"`{value!r}`" for value in values)
        rows.append(" | ".join((f"| `{backend}`", *cells)) + " |")
    return "\n".join(rows) + "\n"

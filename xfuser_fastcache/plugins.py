"""What packages add by entry point: adapters, gates and layouts, found by name."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

ADAPTERS = "xfuser_fastcache.adapters"
GATES = "xfuser_fastcache.gates"
LAYOUTS = "xfuser_fastcache.layouts"


@cache
def registered(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name, none of them loaded.

    Args:
        group: `ADAPTERS`, `GATES` or `LAYOUTS`.

    Raises:
        ValueError: two different objects are registered under one name.

    Example:
        >>> "flux" in registered(ADAPTERS)
        True
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        known = found.setdefault(entry.name, entry)
        if known.value != entry.value:
            raise ValueError(
                f"two entry points of {group!r} are named {entry.name!r}: {known.value} and "
                f"{entry.value}. Names must be unique: uninstall one of the packages or rename its "
                "entry point."
            )
    return found


def loaded(group: str) -> dict[str, Any]:
    """Return what the entry points of a group stand for, by name."""
    return {name: entry.load() for name, entry in registered(group).items()}


def everything_registered() -> dict[str, dict[str, EntryPoint]]:
    """Return the entry points of each group by name, none of them loaded.

    Example:
        >>> everything_registered()[ADAPTERS]["flux"].value
        'diffusers_adapters.flux:FluxAdapter'
    """
    return {group: registered(group) for group in (ADAPTERS, GATES, LAYOUTS)}

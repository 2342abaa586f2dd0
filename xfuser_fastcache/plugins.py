"""What is registered by name: this package's own methods, and what other packages add.

Both come through one door, entry points: those of the methods in this package are listed here, so
that a stale installation misses none; those of others, and our adapters and layouts, are in the
packages' metadata.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

_GATES = "xfuser_fastcache.gates"
_FORECASTERS = "xfuser_fastcache.forecasters"
_TOKENS = "xfuser_fastcache.tokens"
BUILT_IN: dict[str, dict[str, str]] = {
    "xfuser_fastcache.gates": {
        "Fast": f"{_GATES}.chi_square:ChiSquareGate",
        "Fb": f"{_GATES}.first_block:FirstBlockGate",
        "Tea": f"{_GATES}.accumulated:AccumulatedGate",
        "TaylorSeer": f"{_GATES}.interval:IntervalGate",
        "Ada": f"{_GATES}.codebook:CodebookGate",
        "Custom": f"{_GATES}.accumulated:CustomGate",
        "Mag": f"{_GATES}.magnitude:MagnitudeGate",
    },
    "xfuser_fastcache.forecasters": {
        "reuse": f"{_FORECASTERS}.reuse:ReuseForecaster",
        "taylor": f"{_FORECASTERS}.taylor:TaylorForecaster",
        "damped_taylor": f"{_FORECASTERS}.taylor:DampedTaylorForecaster",
        "taylor2": f"{_FORECASTERS}.taylor:SecondOrderTaylorForecaster",
        "output": f"{_FORECASTERS}.output:OutputForecaster",
        "data": f"{_FORECASTERS}.data:DataForecaster",
        "linear": f"{_FORECASTERS}.linear:LinearForecaster",
        "linear_taylor": f"{_FORECASTERS}.linear_taylor:LinearTaylorForecaster",
        "hicache": f"{_FORECASTERS}.hicache:HiCacheForecaster",
        "foca": f"{_FORECASTERS}.foca:FoCaForecaster",
        "dmd": f"{_FORECASTERS}.dmd:DMDForecaster",
        "spectrum": f"{_FORECASTERS}.spectrum:SpectrumForecaster",
        "meancache": f"{_FORECASTERS}.meancache:MeanCacheForecaster",
        "adacorrection": f"{_FORECASTERS}.adacorrection:AdaCorrection",
    },
    "xfuser_fastcache.token_plans": {
        "motion_static": f"{_TOKENS}.saliency:MotionStatic",
        "merging": f"{_TOKENS}.merging:Merging",
    },
}


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    own = (EntryPoint(name, value, group) for name, value in BUILT_IN.get(group, {}).items())
    found: dict[str, EntryPoint] = {}
    for entry in (*own, *entry_points(group=group)):
        known = found.setdefault(entry.name, entry)
        if known.value != entry.value:
            raise ValueError(
                f"two entry points of {group!r} are named {entry.name!r}: {known.value} and "
                f"{entry.value}. Names must be unique: uninstall one of the packages or rename its "
                "entry point."
            )
    return found


class Registry(Mapping[str, Any]):
    """What is registered in one group, by name; each is loaded when it is asked for.

    Args:
        group: of entry points; the name by which a registry is shown.

    Raises:
        ValueError: two different objects are registered under one name.

    Example:
        >>> "flux" in ADAPTERS, list(TOKEN_PLANS)
        (True, ['motion_static', 'merging'])
    """

    def __init__(self, group: str):
        self.group = group
        self._added: dict[str, Any] = {}

    def __repr__(self) -> str:
        return repr(self.group)

    def __getitem__(self, name: str) -> Any:
        return self._added[name] if name in self._added else _entries(self.group)[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter({**_entries(self.group), **self._added})

    def __len__(self) -> int:
        return len(_entries(self.group)) + len(self._added)

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in _entries(self.group)

    def add(self, name: str, thing: Any) -> None:
        """Register what no installed package brings, for this process.

        That is for modules that a program loads from a folder, as ComfyUI does with nodes; loaded
        once more, they take the place of what they were.

        Raises:
            ValueError: another thing has that name.
        """
        known = self._added.get(name)
        if name in _entries(self.group) or (known is not None and _home(known) != _home(thing)):
            raise ValueError(
                f"something is registered in {self.group!r} as {name!r} already, and it is not "
                f"that of {_home(thing)[0]}; choose another name, or remove one of the two copies"
            )
        self._added[name] = thing


def _home(thing: Any) -> tuple[str | None, str]:
    """Return where a class is written; a file may be loaded under several module names."""
    return inspect.getsourcefile(thing), thing.__qualname__


ADAPTERS = Registry("xfuser_fastcache.adapters")
GATES = Registry("xfuser_fastcache.gates")
FORECASTERS = Registry("xfuser_fastcache.forecasters")
TOKEN_PLANS = Registry("xfuser_fastcache.token_plans")
LAYOUTS = Registry("xfuser_fastcache.layouts")


def loaded(registry: Registry) -> dict[str, Any]:
    """Return what is registered, by name, all of it loaded."""
    return dict(registry)


def everything_registered() -> dict[str, dict[str, EntryPoint]]:
    """Return the entry points of each group by name, none of them loaded.

    Example:
        >>> everything_registered()["xfuser_fastcache.gates"]["Fb"].value
        'xfuser_fastcache.gates.first_block:FirstBlockGate'
    """
    groups = (ADAPTERS, GATES, FORECASTERS, TOKEN_PLANS, LAYOUTS)
    return {registry.group: dict(_entries(registry.group)) for registry in groups}


def look_again() -> None:
    """Forget what was found, for a process whose path has changed."""
    _entries.cache_clear()

"""The table: which gate and which forecaster a backend's name stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.forecasters.linear import LinearForecaster
from xfuser_fastcache.forecasters.reuse import ReuseForecaster
from xfuser_fastcache.forecasters.taylor import TaylorForecaster
from xfuser_fastcache.gates.base import Gate
from xfuser_fastcache.gates.chi_square import ChiSquareGate

FORECASTERS: dict[str, type[Forecaster]] = {
    "reuse": ReuseForecaster,
    "linear": LinearForecaster,
    "taylor": TaylorForecaster,
}


@dataclass(frozen=True)
class Backend:
    """A cache method: when to skip, and what stands in."""

    gate: Callable[[CacheConfig], Gate]
    forecaster: Callable[[CacheConfig], Forecaster]


BACKENDS: dict[str, Backend] = {
    "Fast": Backend(ChiSquareGate.from_config, lambda config: FORECASTERS[config.forecaster]()),
}


def backend(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown cache backend {name!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]

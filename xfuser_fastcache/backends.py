"""The table: which gate and which forecaster a backend's name stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.fitted import Fitted
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.forecasters.linear import LinearForecaster
from xfuser_fastcache.forecasters.linear_taylor import LinearTaylorForecaster
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.forecasters.reuse import ReuseForecaster
from xfuser_fastcache.forecasters.taylor import SecondOrderTaylorForecaster, TaylorForecaster
from xfuser_fastcache.gates.base import Gate
from xfuser_fastcache.gates.calibrated import CalibratedGate
from xfuser_fastcache.gates.chi_square import ChiSquareGate
from xfuser_fastcache.layout import DecisionGroup

FORECASTERS: dict[str, type[Forecaster]] = {
    "reuse": ReuseForecaster,
    "linear": LinearForecaster,
    "taylor": TaylorForecaster,
    "taylor2": SecondOrderTaylorForecaster,
    "linear_taylor": LinearTaylorForecaster,
    "output": OutputForecaster,
}


@dataclass(frozen=True)
class Backend:
    """A cache method: when to skip, and what stands in.

    Attributes:
        gate: from the options and, where one is given, a calibration.
        forecaster: likewise, for a rank's place in the decision group.
    """

    gate: Callable[[CacheConfig, Fitted | None], Gate]
    forecaster: Callable[[CacheConfig, Fitted | None, DecisionGroup], Forecaster]


def _fast_gate(config: CacheConfig, fitted: Fitted | None) -> Gate:
    if fitted is None:
        return ChiSquareGate.from_config(config)
    test = config.test or "conformal"
    return CalibratedGate(fitted, config.cache_ratio_threshold, test, config.significance_level)


def _forecaster(config: CacheConfig, fitted: Fitted | None, group: DecisionGroup) -> Forecaster:
    if fitted is None:
        return FORECASTERS[config.forecaster]()
    # A pipeline's stages but the last hand on what no calibration has seen.
    last = group.stage == group.stages - 1
    sees_latents = group.stages == 1
    steering = fitted.steering_of(config.steps_mask, sees_latents) if last else None
    return OutputForecaster(fitted if last else None, sees_latents, steering)


BACKENDS: dict[str, Backend] = {"Fast": Backend(_fast_gate, _forecaster)}


def backend(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown cache backend {name!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]

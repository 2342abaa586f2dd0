"""From a config to its gate, its forecaster and its token plan, where they are to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from xfuser_fastcache.artifacts.calibration import Fitted
from xfuser_fastcache.artifacts.linear_map import SpanMaps
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.config.composition import combination
from xfuser_fastcache.config.methods import made
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.forecasters.data import DataForecaster
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.gates.base import Rule
from xfuser_fastcache.gates.calibrated import CalibratedGate
from xfuser_fastcache.gates.combined import AllOf, AnyOf
from xfuser_fastcache.models.noise import Mixture, velocity
from xfuser_fastcache.plugins import FORECASTERS, GATES

# A backend is a gate, with the forecaster and the limits that it brings.
BACKENDS = GATES
__all__ = ["BACKENDS", "FORECASTERS", "forecaster_of", "gate_of"]


def gate_of(
    config: CacheConfig,
    fitted: Fitted | None = None,
    polynomial: Sequence[float] | None = None,
) -> Rule:
    """Return the gate that a config asks for, or the gates that decide together.

    Args:
        config: with `fitted`, the one that it has resolved.
        fitted: what a calibration left for the model, or None.
        polynomial: published for the model, highest power first; None for none.
    """
    if config.gate is not None:
        return _composed(config.gate, polynomial)
    (gate,) = config.methods.gates
    if fitted is None:
        return _on_model(gate, polynomial)
    return CalibratedGate(fitted, gate.cache_ratio_threshold, gate.test, gate.significance_level)


def _composed(given: Any, polynomial: Sequence[float] | None) -> Rule:
    """Return what `CacheConfig.gate` describes; see composition.py."""
    key = combination(given)
    if key is None:
        return _on_model(made("gate", given), polynomial)
    parts = [_composed(part, polynomial) for part in given[key]]
    return AllOf(parts) if key == "all_of" else AnyOf(parts)


def _on_model(gate: Any, polynomial: Sequence[float] | None) -> Rule:
    return gate.on_model(None if polynomial is None else list(polynomial))


def forecaster_of(
    config: CacheConfig,
    fitted: Fitted | None,
    group: DecisionGroup,
    maps: SpanMaps | None = None,
    mixture: Callable[[float], Mixture] = velocity,
) -> Forecaster:
    """Return the forecaster that a config asks for, for a rank's place in the decision group.

    Args:
        config: with `fitted`, the one that it has resolved.
        fitted: what a calibration left for the model, or None.
        group: of the rank.
        maps: fitted for the span and this forecaster, or None.
        mixture: of the model's latents and predictions, at a noise level.
    """
    chosen: Forecaster = config.methods.forecaster
    if maps is not None:
        return chosen.with_maps(maps)
    if fitted is None:
        return chosen.on_model(mixture, group.is_last_stage)
    if not group.is_last_stage:  # it hands on what no calibration has seen
        return OutputForecaster()
    return OutputForecaster(fitted, fitted.trajectory_correction(config.steps_mask), group.branch)


def uncovered_of(group: DecisionGroup, mixture: Callable[[float], Mixture]) -> Forecaster:
    """Return what stands in where a calibration does not cover a generation: that of a budget.

    Args:
        group: of the rank.
        mixture: of the model's latents and predictions, at a noise level.
    """
    return DataForecaster().on_model(mixture, group.is_last_stage)

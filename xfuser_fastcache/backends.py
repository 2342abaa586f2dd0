"""The table: which gate and which forecaster a backend's name stands for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from xfuser_fastcache.artifacts.calibration import Fitted
from xfuser_fastcache.artifacts.linear_map import SpanMaps
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.config.composition import combination
from xfuser_fastcache.config.published import OF_GATES
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.forecasters.adacorrection import AdaCorrection
from xfuser_fastcache.forecasters.base import Forecaster, LinearMapForecaster
from xfuser_fastcache.forecasters.linear import LinearForecaster
from xfuser_fastcache.forecasters.linear_taylor import LinearTaylorForecaster
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.forecasters.reuse import ReuseForecaster
from xfuser_fastcache.forecasters.taylor import (
    DampedTaylorForecaster,
    SecondOrderTaylorForecaster,
    TaylorForecaster,
)
from xfuser_fastcache.gates.accumulated import IDENTITY, AccumulatedGate
from xfuser_fastcache.gates.base import Gate, Rule
from xfuser_fastcache.gates.calibrated import CalibratedGate
from xfuser_fastcache.gates.chi_square import ChiSquareGate
from xfuser_fastcache.gates.codebook import CodebookGate
from xfuser_fastcache.gates.combined import AllOf, AnyOf
from xfuser_fastcache.gates.first_block import FirstBlockGate
from xfuser_fastcache.gates.interval import IntervalGate
from xfuser_fastcache.measurements.probes import Probe
from xfuser_fastcache.plugins import GATES, registered

WITH_MAPS: dict[str, type[LinearMapForecaster]] = {
    "linear": LinearForecaster,
    "linear_taylor": LinearTaylorForecaster,
}
FORECASTERS: dict[str, type[Forecaster]] = {
    "reuse": ReuseForecaster,
    "taylor": TaylorForecaster,
    "damped_taylor": DampedTaylorForecaster,
    "taylor2": SecondOrderTaylorForecaster,
    "output": OutputForecaster,
    **WITH_MAPS,
}


def _chi_square(config: CacheConfig, fitted: Fitted | None, polynomial: Any) -> Gate:
    if fitted is None:
        return ChiSquareGate.from_config(config)
    test = config.test or "conformal"
    return CalibratedGate(fitted, config.cache_ratio_threshold, test, config.significance_level)


def _first_block(config: CacheConfig, fitted: Any, polynomial: Any) -> Gate:
    return FirstBlockGate(config.cache_ratio_threshold)


def _accumulated(config: CacheConfig, fitted: Any, polynomial: tuple[float, ...] | None) -> Gate:
    coefficients = config.coefficients or polynomial or IDENTITY
    return AccumulatedGate(config.cache_ratio_threshold, coefficients)


def _interval(config: CacheConfig, fitted: Any, polynomial: Any) -> Gate:
    return IntervalGate(config.cache_interval)


def _codebook(config: CacheConfig, fitted: Any, polynomial: Any) -> Gate:
    return CodebookGate(config.codebook)


# A backend is a gate and, unless another is asked for, the forecaster in `published.DEFAULTS`. A
# gate comes from the options, a calibration where one is given, and the polynomial from change of
# input to change of output that is published for the model, where one is.
BACKENDS: dict[str, Callable[..., Gate]] = {
    "Fast": _chi_square,
    "Fb": _first_block,
    "Tea": _accumulated,
    "TaylorSeer": _interval,
    "Ada": _codebook,
    "Custom": _accumulated,
}


def gate_of(
    config: CacheConfig,
    fitted: Fitted | None = None,
    polynomial: tuple[float, ...] | None = None,
) -> Rule:
    """Return the gate that a config asks for, or the gates that decide together.

    Args:
        config: validated options.
        fitted: what a calibration left for the model, or None.
        polynomial: published for the model, highest power first; None for none.

    Raises:
        ValueError: an unknown backend or gate; the message lists the known ones. Or a gate that
            rests on what blocks do, with a forecaster that stands in for the whole forward pass, or
            on what a block in the middle does, with a token plan.
    """
    if config.use_cache not in BACKENDS:
        raise ValueError(
            f"unknown cache backend {config.use_cache!r}; known: {', '.join(BACKENDS)}"
        )
    gate: Rule
    if config.gate is None:
        gate = BACKENDS[config.use_cache](config, fitted, polynomial)
    else:
        gate = _composed(config.gate, polynomial)
    blind = [probe.value for probe in gate.probes if probe is not Probe.SPAN_INPUT]
    named = f"use_cache={config.use_cache!r}" if config.gate is None else f"gate={config.gate!r}"
    if blind and FORECASTERS[config.forecaster].whole_forward:
        raise ValueError(
            f"the gate of {named} rests on {' and '.join(blind)}, which a "
            f"forward pass that forecaster={config.forecaster!r} stands in for does not reach; "
            "choose another forecaster"
        )
    if config.linear_maps is not None and Probe.FIRST_RESIDUAL in gate.probes:
        raise ValueError(
            f"the gate of {named} rests on {Probe.FIRST_RESIDUAL.value} and computes that block "
            "apart, where linear_maps are fitted for the whole stack; choose another gate, or "
            "leave linear_maps out"
        )
    plans = config.splits_tokens or config.merges_tokens
    if plans and Probe.MIDDLE_RESIDUAL in gate.probes:
        raise ValueError(
            f"the gate of {named} rests on {Probe.MIDDLE_RESIDUAL.value}, which token plans leave "
            "out for some tokens; choose another gate, or leave out enable_spatial_approx, "
            "enable_token_merge and their options"
        )
    return gate


def _composed(given: Any, polynomial: tuple[float, ...] | None) -> Rule:
    """Return what `CacheConfig.gate` describes; see composition.py."""
    if isinstance(given, str):
        given = {"name": given}
    key = combination(given)
    if key is not None:
        parts = [_composed(part, polynomial) for part in given[key]]
        return AllOf(parts) if key == "all_of" else AnyOf(parts)
    options = {option: value for option, value in given.items() if option != "name"}
    name, added = given["name"], registered(GATES)
    if name in BACKENDS and name in added:
        raise ValueError(
            f"gate {name!r} is a backend's, and {added[name].value} is registered under the same "
            "name: rename that entry point, or uninstall its package"
        )
    if name in BACKENDS:
        others = sorted(set(options) - {*OF_GATES, "rel_l1_thresh"})
        if others:
            raise ValueError(
                f"{', '.join(others)} in gate={given!r} is no option of a gate; give it beside "
                f"gate, or one of {', '.join(OF_GATES)}"
            )
        config = CacheConfig.from_dict({"use_cache": name, **options})
        return BACKENDS[name](config, None, polynomial)
    if name not in added:
        raise ValueError(
            f"unknown gate {name!r}; known: {', '.join((*BACKENDS, *added))}. A package adds one "
            f"under the entry point group {GATES!r}"
        )
    make = added[name].load()
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"gate {name!r} with options {options!r}: {error}; it takes {inspect.signature(make)}"
        ) from error
    return make(**options)


def forecaster_of(
    config: CacheConfig,
    fitted: Fitted | None,
    group: DecisionGroup,
    maps: SpanMaps | None = None,
) -> Forecaster:
    """Return the forecaster that a config asks for, for a rank's place in the decision group.

    Args:
        config: validated options.
        fitted: what a calibration left for the model, or None.
        group: of the rank.
        maps: fitted for the span and this forecaster, or None.
    """
    if fitted is None:
        name = config.forecaster
        chosen = FORECASTERS[name]() if maps is None else WITH_MAPS[name](maps)
        if config.enable_adacorrection:
            return AdaCorrection(chosen, config.adacorr_gamma, config.adacorr_lambda)
        return chosen
    # A pipeline's stages but the last hand on what no calibration has seen.
    last = group.stage == group.stages - 1
    sees_latents = group.stages == 1
    correction = fitted.trajectory_correction(config.steps_mask, sees_latents) if last else None
    return OutputForecaster(fitted if last else None, sees_latents, correction, group.branch)

"""What a config chose, part by part, as the rule of `capabilities` weighs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xfuser_fastcache.config.budget import BUDGETS
from xfuser_fastcache.config.capabilities import Capability as C
from xfuser_fastcache.config.capabilities import Part
from xfuser_fastcache.config.checks import shown
from xfuser_fastcache.config.composition import spec_of
from xfuser_fastcache.config.methods import token_plans_of, uncorrected_spec

if TYPE_CHECKING:
    from xfuser_fastcache.config.cache_config import CacheConfig


def parts_of(config: CacheConfig) -> list[Part]:
    """Return all parts of a config: its methods, and the options that need something of them."""
    return [*_options(config), *_gates(config), *_forecasters(config), *_token_plans(config)]


def _gates(config: CacheConfig) -> list[Part]:
    if config.gate is not None:
        label = f"gate={shown(config.gate)}"
        # They rest on the config's own options, which a gate inside a mapping does not have.
        more = {C.GATE_TO_CALIBRATE, C.ERROR_BOUND}
    else:
        label, more = f"use_cache={config.use_cache!r}", set()
        label += "" if config.test is None else f" with test={config.test!r}"
    gates = config.methods.gates
    return [Part(label, gate.needs, {*gate.withholds, *more}) for gate in gates]


def _forecasters(config: CacheConfig) -> list[Part]:
    found = config.methods.forecaster
    label = f"forecaster={shown(uncorrected_spec(config))}"
    if config.forecaster is None and config.calibration is not None:
        label = f"calibration={config.calibration!r}"
    parts = []
    if config.enable_adacorrection:
        parts.append(Part("enable_adacorrection", found.needs, found.withholds))
        found = found.of
    inner = getattr(found, "of", None)
    if inner is not None:
        parts.append(Part("of in " + label, inner.needs, inner.withholds))
    return [*parts, Part(label, found.needs, found.withholds, found.offers)]


def _token_plans(config: CacheConfig) -> list[Part]:
    names = [spec_of("token_plan", plan).name for plan in token_plans_of(config)]
    return [
        Part(f"token_plan={name!r}", plan.needs, plan.withholds, plan.offers)
        for name, plan in zip(names, config.methods.token_plans, strict=True)
    ]


def _options(config: CacheConfig) -> list[Part]:
    maps_need = {C.BLOCKS, C.WHOLE_STACK, C.MAPS_TAKER}
    if not config.methods.plan_takes_maps:
        maps_need |= {C.ALL_TOKENS}
    calibrates = {C.GATE_TO_CALIBRATE, C.FORECASTER_TO_CALIBRATE}
    schedule = {C.SOLE_SCHEDULE}
    cuts = config.granularity != "stack"
    asked = {
        "granularity": (cuts, Part("", needs={C.BLOCKS}, withholds={C.WHOLE_STACK})),
        "calibration": (
            config.calibration is not None,
            Part("", needs=calibrates, offers={C.CALIBRATION}),
        ),
        **{
            name: (getattr(config, name) is not None, Part("", needs=schedule, withholds=schedule))
            for name in ("steps_mask", *BUDGETS)
        },
        "linear_maps": (config.linear_maps is not None, Part("", needs=maps_need)),
        "shadow_audit": (config.shadow_audit > 0, Part("", needs={C.ERROR_BOUND, C.ALL_TOKENS})),
    }
    return [
        Part(f"{name}={shown(getattr(config, name))}", part.needs, part.withholds, part.offers)
        for name, (wanted, part) in asked.items()
        if wanted
    ]

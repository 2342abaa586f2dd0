"""From what was given to what holds: every option filled, in one canonical spelling."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from xfuser_fastcache.config.budget import BUDGETS, given_budget, never_skips
from xfuser_fastcache.config.checks import options_of
from xfuser_fastcache.config.flat import flat_names
from xfuser_fastcache.config.methods import (
    budget_of,
    canonical,
    forecaster_spec,
    method_class,
    token_plans_of,
)

if TYPE_CHECKING:
    from xfuser_fastcache.config.cache_config import CacheConfig


class Calibrated(Protocol):
    """What a calibration knows of options."""

    @property
    def options(self) -> dict[str, Any]:
        """Those that it fills where they were not given: the ones named in `OF_CALIBRATION`."""

    @property
    def masks(self) -> dict[int, list[int]]:
        """Number of computed steps -> which ones."""

    @property
    def scales(self) -> dict[float, float]:
        """By alpha; only these it was made for."""

    @property
    def digest(self) -> str:
        """Of its content."""


# Measured: docs/decisions/carried-keys.md. Staggered stages compute a part of their keys from
# forecasts, whose slopes lead astray.
PATCH_KV_SLOPE = 0.7
OF_CALIBRATION = ("cache_ratio_threshold", "test", "num_warmup_steps", "max_consecutive_skips")


def resolved(config: CacheConfig, fitted: Calibrated | None) -> CacheConfig:
    """Return the config with its options filled; see `CacheConfig.resolved`."""
    if never_skips(config):
        config = _without_budget(config)
    companions = method_class("gate", config.use_cache, "cache backend").companions
    default: dict[str, Any] = {
        "num_warmup_steps": companions.num_warmup_steps,
        "max_consecutive_skips": companions.max_consecutive_skips,
    }
    budget = budget_of(config)
    if budget is not None:
        # All that limits skips by default it spreads better.
        default = {"num_warmup_steps": 1, budget.option: budget.value}
    default["patch_kv_slope"] = 0.0 if config.stagger_stages else PATCH_KV_SLOPE
    if config.gate is None:
        (gate,) = config.methods.gates
        default |= {name: getattr(gate, name) for name in options_of(gate)}
    if fitted is not None:
        default |= fitted.options
    elif config.calibration is not None:
        default = {k: v for k, v in default.items() if k not in OF_CALIBRATION}
    # A gate of another package may have options that have no flat name.
    known = (*options_of(config), *flat_names(type(config), "gate"))
    filled = {k: v for k, v in default.items() if k in known and getattr(config, k) is None}
    # From here on token plans and forecasters are spelled as mappings alone.
    other = [*flat_names(type(config), "forecaster"), *flat_names(type(config), "token_plan")]
    other += ["enable_adacorrection", "enable_spatial_approx", "enable_token_merge"]
    filled |= dict.fromkeys(other)
    filled["forecaster"] = canonical("forecaster", forecaster_spec(config))
    plans = [canonical("token_plan", plan) for plan in token_plans_of(config)]
    filled["token_plan"] = plans or None
    if config.gate is not None:
        filled["gate"] = canonical("gate", config.gate)
    found = replace(config, **filled)
    return found if fitted is None else _calibrated(found, fitted)


def _without_budget(config: CacheConfig) -> CacheConfig:
    nothing: dict[str, Any] = dict.fromkeys(BUDGETS)
    return replace(config, **nothing)


def _calibrated(config: CacheConfig, fitted: Calibrated) -> CacheConfig:
    """Return a filled config with the mask that it asks for, checked against the calibration."""
    mask, budget = config.steps_mask, given_budget(config)
    if budget is not None:
        steps = len(next(iter(fitted.masks.values()), ()))
        if budget.of(steps) not in fitted.masks:
            raise ValueError(
                f"{budget}: the calibration has masks of "
                f"{', '.join(map(str, sorted(fitted.masks))) or 'no'} steps"
            )
        mask, config = fitted.masks[budget.of(steps)], _without_budget(config)
    # With a mask the gate is not asked, and what it was made for does not matter.
    if config.test == "conformal" and mask is None:
        epsilon = fitted.options["cache_ratio_threshold"]
        # 0 never skips, so it holds at any epsilon.
        if config.cache_ratio_threshold not in (epsilon, 0):
            raise ValueError(
                f"cache_ratio_threshold={config.cache_ratio_threshold!r} is not what the "
                f"calibration was made for ({epsilon!r}); leave it out, or make another with "
                "fastcache calibrate --cache_ratio_threshold"
            )
        if config.significance_level not in fitted.scales:
            raise ValueError(
                f"significance_level={config.significance_level!r}: the calibration is for "
                + (", ".join(map(str, sorted(fitted.scales))) or "masks alone; give computed_steps")
            )
    return replace(config, steps_mask=mask, calibration=fitted.digest)

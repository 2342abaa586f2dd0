"""From what a config says to the methods that it chose, each made from its own options."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xfuser_fastcache.config.budget import Budget, given_budget, says_which_steps
from xfuser_fastcache.config.capabilities import Capability
from xfuser_fastcache.config.checks import Check, CheckedOptions, option, options_of, shown
from xfuser_fastcache.config.composition import ONE, combination, single_gates, spec_of
from xfuser_fastcache.plugins import FORECASTERS, GATES, TOKEN_PLANS

if TYPE_CHECKING:
    from xfuser_fastcache.config.cache_config import CacheConfig

REGISTRIES = {"gate": GATES, "forecaster": FORECASTERS, "token_plan": TOKEN_PLANS}
# Takes fitted linear maps where no forecaster is asked for.
MAPPED = "linear_taylor"


def method_class(kind: str, name: str, called: str = "") -> Any:
    """Return what is registered under a name.

    Args:
        kind: `gate`, `forecaster` or `token_plan`.
        name: of the method.
        called: what the message calls it; the kind where that is left out.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    registry = REGISTRIES[kind]
    if name not in registry:
        raise ValueError(
            f"unknown {called or kind} {shown(name)}; known: {', '.join(registry)}. A package "
            f"adds one under the entry point group {registry!r}"
        )
    return registry[name]


def made(kind: str, given: Any) -> Any:
    """Return the method that a name or mapping asks for, made from its options.

    Raises:
        ValueError: an unknown method or option, or a value out of range.
        TypeError: a value of the wrong type.
    """
    name, options = spec_of(kind, given)
    make = method_class(kind, name)
    known = options_of(make)
    stray = sorted(set(options) - set(known))
    if known and stray:
        raise ValueError(
            f"{', '.join(stray)} in {kind}={shown(given)} is no option of the {kind} {name!r}, "
            f"which takes {', '.join(known)}; give it beside {kind}, or leave it out"
        )
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"{kind} {name!r} with options {shown(options)}: {error}; it takes "
            f"{inspect.signature(make)}"
        ) from error
    return make(**options)


def method_option(kind: str, default: str, meaning: str) -> Any:
    """Return an option that is a method itself: kept as what its name or mapping stands for."""

    def read(given: Any) -> Any:
        if isinstance(given, (str, dict)):
            return made(kind, given)
        if not isinstance(given, CheckedOptions):
            raise TypeError
        return given

    return option(default, Check(f"a {kind}'s name, or {ONE}", read), meaning, kind=kind)


def canonical(kind: str, given: Any) -> Any:
    """Return a name or mapping with all options filled in; the bare name where all are defaults.

    Two spellings of one method have one canonical form.

    Example:
        >>> canonical("forecaster", {"name": "damped_taylor", "share": 0.6})
        'damped_taylor'
        >>> canonical("gate", {"all_of": ["Fb", {"name": "TaylorSeer", "cache_interval": 4}]})
        {'all_of': ['Fb', {'name': 'TaylorSeer', 'cache_interval': 4}]}
    """
    key = combination(given) if kind == "gate" else None
    if key is not None:
        return {key: [canonical(kind, part) for part in given[key]]}
    name, options = spec_of(kind, given)
    if not options:
        return name
    method = made(kind, given)
    if options_of(method):
        bare = made(kind, name)
        values = {key: getattr(method, key) for key in options_of(method)}
        if all(value == getattr(bare, key) for key, value in values.items()):
            return name
        for key, field in options_of(method).items():
            if "kind" in field.metadata:
                values[key] = canonical(field.metadata["kind"], options.get(key, field.default))
        options = values
    return {"name": name, **options}


@dataclass(frozen=True)
class Methods:
    """The methods that a config chose.

    Attributes:
        gates: each that decides, of however many.
        forecaster: what stands in for a skipped span.
        token_plans: what choose the tokens of computed spans.
    """

    gates: tuple[Any, ...]
    forecaster: Any
    token_plans: tuple[Any, ...]

    @property
    def plan_takes_maps(self) -> bool:
        """Whether linear maps are for static tokens, and not for the forecaster."""
        return any(plan.takes_maps for plan in self.token_plans)


def methods_of(config: CacheConfig) -> Methods:
    """Return the methods of a config."""
    plans = tuple(made("token_plan", one) for one in token_plans_of(config))
    return Methods(gates_of(config), made("forecaster", forecaster_spec(config)), plans)


def budget_of(config: CacheConfig) -> Budget | None:
    """Return the budget that a config asks for, or its backend's own where nothing says which steps
    are computed; None where a gate decides or a mask."""
    given = given_budget(config)
    if given is not None or says_which_steps(config):
        return given
    quality = method_class("gate", config.use_cache, "cache backend").companions.quality
    return None if quality is None else Budget("quality", quality)


def gates_of(config: CacheConfig) -> tuple[Any, ...]:
    """Return each gate that decides, of however many."""
    if config.gate is None:
        return (made("gate", {"name": config.use_cache, **config.given_of("gate")}),)
    return tuple(made("gate", one) for one in single_gates(config.gate))


def token_plans_of(config: CacheConfig) -> list[Any]:
    """Return the token plans that a config asks for, each by name or mapping."""
    if config.token_plan is not None:
        listed = isinstance(config.token_plan, list)
        return list(config.token_plan) if listed else [config.token_plan]
    given = config.given_of("token_plan")
    switches = {"motion_static": config.enable_spatial_approx, "merging": config.enable_token_merge}
    found = []
    for name, switch in switches.items():
        own = {k: v for k, v in given.items() if k in options_of(TOKEN_PLANS[name])}
        if bool(own) if switch is None else switch:
            found.append({"name": name, **own})
    return found


def uncorrected_spec(config: CacheConfig) -> Any:
    """Return the forecaster that a config asks for, before `enable_adacorrection`."""
    if config.forecaster is not None:
        return config.forecaster
    if config.calibration is not None:
        return "output"
    if config.linear_maps is not None:
        names = (spec_of("token_plan", plan).name for plan in token_plans_of(config))
        if not any(method_class("token_plan", name).takes_maps for name in names):
            return MAPPED
    companions = method_class("gate", config.use_cache, "cache backend").companions
    budgeted = budget_of(config) is not None and not _needs_blocks(config)
    return (budgeted and companions.budgeted) or companions.forecaster


def _needs_blocks(config: CacheConfig) -> bool:
    """Whether something that was chosen needs single blocks, beside the forecaster."""
    cuts = config.granularity != "stack" or bool(config.enable_adacorrection)
    gates = gates_of(config)
    plans = [made("token_plan", one) for one in token_plans_of(config)]
    return cuts or any(Capability.BLOCKS in method.needs for method in (*gates, *plans))


def forecaster_spec(config: CacheConfig) -> Any:
    """Return the forecaster that a config asks for, by name or mapping."""
    spec = uncorrected_spec(config)
    if not config.enable_adacorrection:
        return spec
    flat = options_of(FORECASTERS["adacorrection"])
    given = config.given_of("forecaster")
    own = {name: given.get(found.metadata.get("flat", "")) for name, found in flat.items()}
    return {
        "name": "adacorrection",
        "of": spec,
        **{name: value for name, value in own.items() if value is not None},
    }

"""Options of methods given flat, under the names of the source documents and of xDiT.

`CacheConfig` has a field for each, and the method that owns the option describes and checks it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from xfuser_fastcache.config.checks import checked, options_of, shown
from xfuser_fastcache.config.methods import method_class
from xfuser_fastcache.plugins import BUILT_IN, FORECASTERS, TOKEN_PLANS

if TYPE_CHECKING:
    from xfuser_fastcache.config.cache_config import CacheConfig


def flat(kind: str) -> Any:
    """Return the field of an option that a method of this kind owns."""
    return dataclasses.field(default=None, metadata={"of": kind})


def flat_names(config: type[CacheConfig], kind: str) -> list[str]:
    """Return the flat names of options of a kind of method."""
    return [f.name for f in dataclasses.fields(config) if f.metadata.get("of") == kind]


def checked_flat(config: CacheConfig) -> dict[str, Any]:
    """Return the options of methods that were given flat, each checked by the method that owns it.

    Those of a token plan or of AdaCorrection may be given where that is switched off.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, an option that the gate does not have, or two spellings.
    """
    owners = [FORECASTERS["adacorrection"]]
    owners += [TOKEN_PLANS[name] for name in BUILT_IN[TOKEN_PLANS.group]]
    known = {
        found.metadata.get("flat", name): found
        for owner in owners
        for name, found in options_of(owner).items()
    }
    place = "an option of a gate; give it inside gate={'name': NAME, ...}"
    gate = method_class("gate", config.use_cache, "cache backend")
    if config.gate is None:
        known |= options_of(gate)
        place = (
            f"no option of use_cache={config.use_cache!r}; leave it out, or choose another backend"
        )
    tokens = config.given_of("token_plan")
    switches = ("enable_spatial_approx", "enable_token_merge")
    twice = [*tokens, *(name for name in switches if getattr(config, name) is not None)]
    if config.token_plan is not None and twice:
        raise ValueError(
            f"{', '.join(twice)} and token_plan={shown(config.token_plan)} are two spellings "
            "of token plans; give one of them"
        )
    given = {**config.given_of("gate"), **config.given_of("forecaster"), **tokens}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{name}={shown(value)} is {place}")
        given[name] = checked(known[name], value, name)
    return given

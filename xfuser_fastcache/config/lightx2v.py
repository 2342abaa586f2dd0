"""Cache options in JSON files of LightX2V: read, and written so that they read back the same."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from xfuser_fastcache.config.checks import shown

logger = logging.getLogger("xfuser_fastcache")

MARK = "feature_caching"
# LightX2V's name -> the option's.
_NAMES = {
    MARK: "use_cache",
    "teacache_thresh": "cache_ratio_threshold",
    "coefficients": "coefficients",
    "infer_steps": "num_steps",
    "use_ret_steps": "num_warmup_steps",
}
# With retention, LightX2V computes the first five steps, without it the first one.
_RETAINED, _FIRST = 5, 1


def read(given: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the cache options in a file of LightX2V; what belongs to its pipeline is left there.

    Args:
        given: the file's mapping, with `feature_caching` in it.
        known: names of our options, which such a file may hold beside LightX2V's.

    Raises:
        ValueError: `feature_caching` asks for no cache, or two names of one option differ.
        TypeError: `use_ret_steps` is neither true nor false.

    Example:
        >>> read({"feature_caching": "Tea", "teacache_thresh": 0.2, "use_ret_steps": True}, [])
        {'use_cache': 'Tea', 'cache_ratio_threshold': 0.2, 'num_warmup_steps': 5}
    """
    asked = given[MARK]
    if isinstance(asked, str) and asked.lower().startswith("no"):
        raise ValueError(f"{MARK}={asked!r} asks for no cache; then apply none")
    options: dict[str, Any] = {}
    for key, value in given.items():
        name = _NAMES.get(key, key if key in known else None)
        if name is None:
            continue
        if key == "coefficients" and _several(value):
            # For runs with retention, and for runs without, which measure the timestep's embedding
            # before its projection; blocks are given the projection, so the first one fits here.
            value = next((one for one in value if one), value[0])
        if key == "use_ret_steps":
            if not isinstance(value, bool):
                raise TypeError(f"{key}={shown(value)} is not allowed; give true | false")
            value = _RETAINED if value else _FIRST
        if options.setdefault(name, value) != value:
            raise ValueError(
                f"{key}={shown(value)} and {name}={shown(options[name])} are one option"
            )
    left = sorted(key for key in given if key not in _NAMES and key not in known)
    if left:
        logger.warning("Of a LightX2V file, these are no options of the cache: %s", ", ".join(left))
    return options


def _several(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


def write(options: dict[str, Any]) -> dict[str, Any]:
    """Return options under LightX2V's names where it has one, without those that are None.

    Example:
        >>> write({"use_cache": "Tea", "cache_ratio_threshold": 0.2, "num_steps": None})
        {'feature_caching': 'Tea', 'teacache_thresh': 0.2}
    """
    # Warm-up steps have no name there that says how many.
    theirs = {name: key for key, name in _NAMES.items() if key != "use_ret_steps"}
    return {theirs.get(k, k): v for k, v in options.items() if v is not None}

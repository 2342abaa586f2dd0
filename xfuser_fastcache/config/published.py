"""What the originals of the backends publish: defaults and tables, with their sources."""

from __future__ import annotations

import math
from typing import Any

# AdaCache, arXiv 2411.02397: upper end of a rate of change -> interval in steps. As in LightX2V.
CODEBOOKS: dict[str, dict[float, int]] = {
    "slow": {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.0: 3},
    "fast": {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.4: 2, 1.0: 1},
}

# Options that are left out take these. None: the rule knows no such thing.
_PUBLISHED = {
    # FastCache's threshold; the rest by measurement (docs/decisions/damped-taylor.md).
    "Fast": (0.05, "damped_taylor", 2, 4),
    # diffusers' FirstBlockCacheConfig; without a first computed step there is no reference.
    "Fb": (0.05, "reuse", 1, None),
    # TeaCache's code for FLUX.
    "Tea": (0.6, "reuse", 1, None),
    # diffusers' TaylorSeerCacheConfig.
    "TaylorSeer": (None, "taylor", 3, None),
    "Ada": (None, "reuse", 1, None),
    # LightX2V's CustomCache: TeaCache's decisions, TaylorSeer's forecasts.
    "Custom": (0.6, "taylor", 1, None),
}
_OPTIONS = ("cache_ratio_threshold", "forecaster", "num_warmup_steps", "max_consecutive_skips")
DEFAULTS: dict[str, dict[str, Any]] = {
    name: dict(zip(_OPTIONS, values, strict=True)) for name, values in _PUBLISHED.items()
}
# Options that belong to some backends alone, with their defaults there.
OWN: dict[str, dict[str, Any]] = {
    "Fast": {"significance_level": 0.05, "test": None},
    "Tea": {"coefficients": None},
    "Custom": {"coefficients": None},
    "TaylorSeer": {"cache_interval": 5},
    "Ada": {"codebook": "slow"},
}
OWNED = tuple(dict.fromkeys(name for options in OWN.values() for name in options))
# Options that belong to a gate, and so stand inside it where gates are named one by one.
OF_GATES = ("cache_ratio_threshold", *OWNED)


def read_codebook(given: Any) -> dict[float, int] | None:
    """Return a codebook by its name or its entries, or None where that is none.

    Example:
        >>> read_codebook({"0.1": 4, 1: 2}), read_codebook("slower"), read_codebook({0.1: 0})
        ({0.1: 4, 1.0: 2}, None, None)
    """
    if isinstance(given, str):
        return dict(CODEBOOKS[given]) if given in CODEBOOKS else None
    if not isinstance(given, dict) or not given:
        return None
    try:
        found = {float(end): interval for end, interval in given.items()}  # JSON has text for keys
    except (TypeError, ValueError):
        return None
    intervals = [i for i in found.values() if isinstance(i, int) and not isinstance(i, bool)]
    fine = len(intervals) == len(found) and min(intervals) >= 1
    return found if fine and all(0 < end < math.inf for end in found) else None

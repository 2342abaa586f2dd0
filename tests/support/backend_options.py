"""For each registered backend, options with which it never skips, and with which it skips often.

A backend that is registered is in every test that goes by these. Ours whose threshold is no
`cache_ratio_threshold` say here what stands for it; another package's runs by its defaults, and
never skips where warm-up never ends.
"""

from __future__ import annotations

from typing import Any

from xfuser_fastcache.backends import BACKENDS
from xfuser_fastcache.config.checks import options_of

# With none of them a change is bounded, and a computed step follows in the end.
_MIXED = {"max_consecutive_skips": 3}
_NEVER: dict[str, dict[str, Any]] = {
    "TaylorSeer": {"cache_interval": 1},
    "Ada": {"codebook": {1: 1}},
}
# Far above what random weights change from step to step.
_OFTEN: dict[str, dict[str, Any]] = {
    "Fast": {"cache_ratio_threshold": 12.0},
    "Tea": {"cache_ratio_threshold": 40.0, "coefficients": [1.0, 0.0], **_MIXED},
    "Custom": {"cache_ratio_threshold": 40.0, "coefficients": [1.0, 0.0], **_MIXED},
    "TaylorSeer": {"cache_interval": 3, "num_warmup_steps": 2},
    "Ada": {"codebook": {0.01: 2, 100: 3}},
    "Mag": {"cache_ratio_threshold": 12.0, "num_warmup_steps": 2},
}


def _threshold(name: str) -> bool:
    return "cache_ratio_threshold" in options_of(BACKENDS[name])


def _never(name: str) -> dict[str, Any]:
    return {"cache_ratio_threshold": 0} if _threshold(name) else {"num_warmup_steps": 100}


def _often(name: str) -> dict[str, Any]:
    return {"cache_ratio_threshold": 12.0, **_MIXED} if _threshold(name) else _MIXED


NEVER = {name: _NEVER.get(name) or _never(name) for name in BACKENDS}
OFTEN = {name: _OFTEN.get(name) or _often(name) for name in BACKENDS}

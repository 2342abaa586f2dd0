"""For each registered backend, options with which it never skips, and with which it skips often.

A backend that is registered is in every test that goes by these; one whose threshold is no
`cache_ratio_threshold` says here what stands for it.
"""

from __future__ import annotations

from typing import Any

from xfuser_fastcache.backends import BACKENDS

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
}
NEVER = {name: _NEVER.get(name, {"cache_ratio_threshold": 0}) for name in BACKENDS}
OFTEN = {name: _OFTEN.get(name, {"cache_ratio_threshold": 12.0, **_MIXED}) for name in BACKENDS}

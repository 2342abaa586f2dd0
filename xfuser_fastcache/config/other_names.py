"""Names that options have elsewhere: taken where they mean the same, else refused with ours."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from xfuser_fastcache.config.checks import is_number, shown

logger = logging.getLogger("xfuser_fastcache")

_THRESHOLD, _WARMUP, _SKIPS = "cache_ratio_threshold", "num_warmup_steps", "max_consecutive_skips"
# Name in TeaCache, xDiT, LightX2V, cache-dit or diffusers -> ours, of the same meaning.
OTHER_NAMES = {
    "rel_l1_thresh": _THRESHOLD,
    "teacache_thresh": _THRESHOLD,
    "residual_diff_threshold": _THRESHOLD,
    "rdt": _THRESHOLD,
    "threshold": _THRESHOLD,
    "max_warmup_steps": _WARMUP,
    "disable_cache_before_step": _WARMUP,
    "max_continuous_cached_steps": _SKIPS,
    "max_skip_steps": _SKIPS,
    "num_inference_steps": "num_steps",
    "steps_computation_mask": "steps_mask",
    "scm_policy": "quality",
    "mask_policy": "quality",
}
# The change of the first block's residual, which one backend alone measures.
_OF_FIRST_BLOCK = ("residual_diff_threshold", "rdt", "threshold")
_EVENLY = "as many steps are computed as cache-dit's mask has, evenly spaced"
_DIFFERS = {
    "steps_computation_mask": "what it marks with 0 is always skipped, as by cache-dit's policy "
    "'static'",
    "scm_policy": _EVENLY,
    "mask_policy": _EVENLY,
}
_FIRST = "use_cache='Fb' computes the first block alone before it decides; leave it out"
_LAST = "no block runs behind a skip; forecaster= says what stands in for it"
_BRANCHES = "each guidance branch is told by itself; leave it out"
_ORDER = "forecaster='taylor' is of the first order, 'taylor2' of the second"
_MASK = "steps_mask says which steps are computed"
_RETAINED = "num_warmup_steps says how many steps are always computed"
# Name elsewhere -> what there is in its place.
REFUSED = {
    **dict.fromkeys(("Fn", "Fn_compute_blocks"), _FIRST),
    **dict.fromkeys(("Bn", "Bn_compute_blocks"), _LAST),
    **dict.fromkeys(
        ("enable_separate_cfg", "cfg_compute_first", "cfg_diff_compute_separate"), _BRANCHES
    ),
    **dict.fromkeys(("max_order", "taylorseer_order", "enable_taylorseer"), _ORDER),
    **dict.fromkeys(("compute_bins", "cache_bins", "warmup_interval"), _MASK),
    **dict.fromkeys(("force_refresh_step_hint", "force_refresh_step_policy"), _MASK),
    **dict.fromkeys(("use_ret_steps", "ret_steps", "retention_ratio"), _RETAINED),
    "max_cached_steps": "computed_steps is the budget of steps that are computed",
    "max_accumulated_residual_diff_threshold": "use_cache='Tea' adds changes up",
    "steps_computation_policy": "steps_mask skips what it marks with 0; leave it out",
    "use_lite_mode": "forecaster='output' stands in for the whole forward pass",
    "cache_type": "use_cache names the backend",
}


@cache
def _note(theirs: str, ours: str) -> None:
    more = f"; {_DIFFERS[theirs]}" if theirs in _DIFFERS else ""
    logger.warning("%s is taken for %s%s", theirs, ours, more)


def renamed(options: dict[str, Any], backend: Any) -> dict[str, Any]:
    """Return options under our names.

    All but xDiT's own `rel_l1_thresh` are noted once.

    Args:
        options: as they were given.
        backend: that takes them.

    Raises:
        ValueError: a name that means something else here, or two names of one option with two
            values.

    Example:
        >>> renamed({"rel_l1_thresh": 0.1}, "Tea")
        {'cache_ratio_threshold': 0.1}
        >>> renamed({"max_order": 2}, "TaylorSeer")
        Traceback (most recent call last):
        ...
        ValueError: max_order=2 is no option here: forecaster='taylor' is of the first order, \
'taylor2' of the second
    """
    options = dict(options)
    for name in options:
        if name in REFUSED:
            raise ValueError(f"{name}={shown(options[name])} is no option here: {REFUSED[name]}")
        if name in _OF_FIRST_BLOCK and not (isinstance(backend, str) and backend == "Fb"):
            raise ValueError(
                f"{name}={shown(options[name])} is a threshold of the first block's residual, as "
                f"use_cache='Fb' measures it; use_cache={shown(backend)} takes {_THRESHOLD}"
            )
    for theirs, ours in OTHER_NAMES.items():
        if theirs in options:
            given = options.pop(theirs)
            other = options.setdefault(ours, given)
            # Of what is no number nothing is asked: two arrays are neither equal nor different.
            equal = is_number(given) and is_number(other) and given == other
            if other is not given and not equal:
                raise ValueError(
                    f"{theirs}={shown(given)} and {ours}={shown(other)} are two names of one "
                    "option; give one of them"
                )
            if theirs != "rel_l1_thresh":
                _note(theirs, ours)
    return options

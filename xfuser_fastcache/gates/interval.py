"""TaylorSeer's gate: every so many steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xfuser_fastcache.config.checks import integer, option
from xfuser_fastcache.gates.base import Companions, Evidence, Gate, Verdict


@dataclass(frozen=True)
class IntervalGate(Gate):
    """Computes a span every `cache_interval` steps, whatever happens; nothing is measured.

    Example:
        >>> gate = IntervalGate(3)
        >>> where = dict(change=0.0, change_squared=0.0, reference=0.0, tokens=0, dim=32)
        >>> ages = [Evidence(lag=lag, noise_levels=(0.8, 0.9, None), **where) for lag in (1, 2, 3)]
        >>> [gate.judge(age).may_skip for age in ages]
        [True, True, False]

    Source: TaylorSeer, arXiv 2503.06923. Deviation: diffusers' hook computes the step after the
    first one that it forecasts, and only then keeps the interval; here, as in the paper's own code,
    the first interval is as long as the others.
    """

    probe = None
    asks_always = True

    # As in diffusers' TaylorSeerCacheConfig.
    companions = Companions("taylor", num_warmup_steps=3)

    cache_interval: int = option(
        5, integer(1, more="; 1 never skips"), "steps from one computed step to the next"
    )

    def judge(self, evidence: Evidence, state: Any = None) -> Verdict:
        """Compare the age of the anchor with the interval."""
        return Verdict(float(evidence.lag), float(self.cache_interval))

"""TeaCache's gate: change that adds up from step to step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from xfuser_fastcache.config.checks import number, numbers, option
from xfuser_fastcache.gates.base import Companions, Evidence, Gate, Verdict
from xfuser_fastcache.measurements.probes import Probe

IDENTITY = [1.0, 0.0]


@dataclass(frozen=True)
class AccumulatedGate(Gate):
    r"""Skips while the estimated change of the output since the last computed step stays small.

    With :math:`x_t` the first block's normed and modulated input, on image tokens,
    :math:`d_t = \sum |x_t - x_{t-1}| \,/ \sum |x_{t-1}|` against the step before, computed or not,
    and a polynomial :math:`p` from change of input to change of output: skip when
    :math:`\sum_s p(d_s) < threshold`, summed over the steps since the last computed one.

    Example:
        >>> gate = AccumulatedGate(0.1)
        >>> where = dict(change_squared=0.0, tokens=64, dim=32, noise_levels=(0.8, 0.9, None))
        >>> step = Evidence(change=0.6, reference=10.0, lag=1, **where)
        >>> total = gate.update(gate.init(), step, skipped=True)
        >>> total, gate.judge(step, gate.init()).may_skip, gate.judge(step, total).may_skip
        (0.06, True, False)

    Source: TeaCache, arXiv 2411.19108, and its code for FLUX. Deviations: under PipeFusion
    the change is that of the step before, brought to this step by the ratio of the gaps in noise
    level. xDiT's teacache counts steps from its second call on: it also computes the second step,
    and the last one only if it is told one step fewer; here the last step is computed where the
    number of steps is known, and the second one by `num_warmup_steps`.
    """

    probe = Probe.MODULATED_INPUT

    cache_ratio_threshold: float = option(
        0.6,  # TeaCache's for FLUX; xDiT's runner takes 0.12.
        number(more="; 0 never skips"),
        "estimated relative change of the output, summed since the last computed step, below which "
        "may be skipped (ratio)",
    )
    coefficients: list[float] | None = option(
        None,
        numbers(1, 16, ", highest power first"),
        "polynomial from relative change of the modulated input to that of the output",
        none="the one published for the model, or the identity",
    )

    def on_model(self, polynomial: list[float] | None) -> AccumulatedGate:
        """Take the model's polynomial, where none was given."""
        return replace(self, coefficients=self.coefficients or polynomial or IDENTITY)

    def init(self) -> float:
        """Nothing has added up."""
        return 0.0

    def judge(self, evidence: Evidence, state: float | None = None) -> Verdict:
        """Compare the sum, this step's change among it, with the threshold."""
        added = self._added(evidence)
        if added is None or self.cache_ratio_threshold == 0:
            return Verdict(None, 0.0)
        return Verdict((state or 0.0) + added, self.cache_ratio_threshold)

    def update(self, state: float, evidence: Evidence, skipped: bool) -> float:
        """Add this step's change; a computed step starts anew."""
        return state + (self._added(evidence) or 0.0) if skipped else 0.0

    def _added(self, evidence: Evidence) -> float | None:
        """Return the polynomial of the relative change."""
        change = evidence.relative_change
        return None if change is None else float(np.polyval(self.coefficients or IDENTITY, change))


@dataclass(frozen=True)
class CustomGate(AccumulatedGate):
    """TeaCache's decisions with TaylorSeer's forecasts.

    Source: LightX2V's CustomCache.
    """

    companions = Companions("taylor")

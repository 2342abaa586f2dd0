"""MagCache's gate: how far magnitudes of residuals have moved by a known law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from xfuser_fastcache.config.checks import Check, number, numbers, option
from xfuser_fastcache.gates.base import Companions, Evidence, Gate, Verdict

# github.com/Zehong-Ma/MagCache for FLUX.1-dev with 28 steps, as diffusers 0.42 has them.
RATIOS = {
    "flux": (
        *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125),
        *(1.02344, 0.98047, 1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609),
        *(0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062),
    )
}
_LIST = numbers(1, 1000, ", one a step")


def read_ratios(given: Any) -> list[float]:
    """Return ratios by their name or as they are given; a bare ValueError where that is none.

    Example:
        >>> read_ratios([1, 0.9]), len(read_ratios("flux"))
        ([1.0, 0.9], 28)
    """
    if not isinstance(given, str):
        return _LIST.read(given)
    if given not in RATIOS:
        raise ValueError
    return list(RATIOS[given])


class Drift(NamedTuple):
    """What has added up since the last computed step.

    Attributes:
        ratio: product of the steps' ratios.
        error: sum over the steps of how far that product was from 1.
    """

    ratio: float = 1.0
    error: float = 0.0


@dataclass(frozen=True)
class MagnitudeGate(Gate):
    r"""Skips while the residual's magnitude, by a law that was measured once, has moved little.

    With :math:`\gamma_t` the mean over tokens of a residual's norm over that of the step before,
    measured once for the model, skip while :math:`\sum_s |1 - \prod_{u \le s} \gamma_u|` over the
    steps `s` since the last computed one stays below the threshold. Nothing is measured here. The
    law is stretched to another number of steps by its nearest entry; where the number of steps is
    not known, nothing is skipped.

    Example:
        >>> gate = MagnitudeGate(0.2, mag_ratios=[1.0, 0.9, 0.9])
        >>> where = dict(change=0.0, change_squared=0.0, reference=0.0, tokens=0, dim=32)
        >>> middle, end = (
        ...     Evidence(lag=lag, noise_levels=(0.8, 0.9, None), elapsed=elapsed, **where)
        ...     for lag, elapsed in ((1, 0.5), (2, 1.0))
        ... )
        >>> drift = gate.update(gate.init(), middle, skipped=True)
        >>> gate.judge(middle, gate.init()).may_skip, gate.judge(end, drift).may_skip
        (True, False)

    Source: MagCache, arXiv 2506.09045, as in diffusers `hooks/mag_cache.py`, whose defaults these
    are; MagCache's own for FLUX are 0.24 with 5 skips and 3 steps of warm-up. Deviations: at the
    threshold itself the original skips; its retention is `num_warmup_steps`, here 0.2 of 28 steps,
    its `max_skip_steps` the engine's `max_consecutive_skips`, and the last step is computed where
    the number of steps is known. The law of FLUX stands where none is given, for other models too:
    `MagCacheConfig(calibrate=True)` of diffusers prints that of a model.
    """

    probe = None
    asks_always = True
    companions = Companions(num_warmup_steps=6, max_consecutive_skips=3)

    cache_ratio_threshold: float = option(
        0.06,
        number(more="; 0 never skips"),
        "error of magnitude, summed since the last computed step, below which may be skipped "
        "(ratio)",
    )
    mag_ratios: list[float] = option(
        "flux",
        Check(f"flux, or {_LIST.allowed}", read_ratios),
        "magnitude of each step's residual over that of the step before (ratio)",
    )

    def init(self) -> Drift:
        """Nothing has added up."""
        return Drift()

    def judge(self, evidence: Evidence, state: Drift | None = None) -> Verdict:
        """Compare the summed error, this step's among it, with the threshold."""
        moved = self._moved(state or Drift(), evidence)
        if moved is None:
            return Verdict(None, 0.0)
        return Verdict(moved.error, self.cache_ratio_threshold)

    def update(self, state: Drift, evidence: Evidence, skipped: bool) -> Drift:
        """Add this step's error; a computed step starts anew."""
        moved = self._moved(state, evidence) if skipped else None
        return moved or Drift()

    def _moved(self, state: Drift, evidence: Evidence) -> Drift | None:
        """Return what adds up with this step; None where its place in the plan is not known."""
        if evidence.elapsed is None:
            return None
        # Halves go to the even neighbour, as in the original.
        entry = round(evidence.elapsed * (len(self.mag_ratios) - 1))
        ratio = state.ratio * self.mag_ratios[entry]
        return Drift(ratio, state.error + abs(1.0 - ratio))

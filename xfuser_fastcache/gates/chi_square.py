"""FastCache's gate: a chi-square test on the change of a span's input."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from scipy.special import gammaincinv

from xfuser_fastcache.config.budget import AUTO
from xfuser_fastcache.config.capabilities import Capability
from xfuser_fastcache.config.checks import choice, number, option
from xfuser_fastcache.gates.base import Companions, Evidence, Gate, Verdict

# Tokens of one picture are correlated, so the token count overstates the degrees of freedom.
MAX_DEGREES_OF_FREEDOM = 64.0


@dataclass(frozen=True)
class ChiSquareGate(Gate):
    r"""Skips a span whose input changed too little to matter.

    With :math:`Q = \sum \|h - h_{anchor}\|^2`, :math:`R = \sum \|h_{anchor}\|^2` and g the steps
    since the anchor:

    - `test="chi2"`: skip when :math:`g^2 Q < \epsilon^2 R\, \chi^2_{\nu,\alpha} / \nu` (lower
      quantile): an equivalence test that skips only where a change of :math:`\epsilon` or more is
      rejected, so a smaller alpha is safer. Each step skipped since the anchor has left its error,
      so what counts is the change times their number. :math:`\nu = (\sum q)^2 / \sum q^2` over
      tokens is a heuristic: it ignores correlation between tokens, so it is capped at 64.
    - `test="paper"`: FastCache's literal rule, skip when
      :math:`\delta^2 = Q/R < \chi^2_{ND,1-\alpha} / (ND)`. Its threshold is just above 1 for any
      real model, so nearly any change below 100 % passes, and a smaller alpha makes it looser.
      It has no epsilon; a `cache_ratio_threshold` of 0 still means "never skip".
    - `test="conformal"` is a calibration's: `gates/calibrated.py`.

    Example:
        >>> gate = ChiSquareGate(cache_ratio_threshold=0.1)
        >>> where = dict(tokens=256, dim=64, lag=1, noise_levels=(0.8, 0.9, None))
        >>> near = Evidence(change=0.5, change_squared=0.001, reference=100.0, **where)
        >>> far = Evidence(change=2.0, change_squared=0.016, reference=100.0, **where)
        >>> gate.judge(near).may_skip, gate.judge(far).may_skip
        (True, False)

    Source: FastCache, arXiv 2505.20353, section on the transformer-level cache. `chi2` deviates
    from it: the published statistic has no scale, so its test accepts what it should reject, and
    knows no age of the anchor (docs/decisions/change-times-age.md compares statistics).
    """

    # By measurement (docs/decisions/damped-taylor.md, budgets.md and no-option.md).
    companions = Companions("damped_taylor", 2, 4, budgeted="data", quality=AUTO)

    cache_ratio_threshold: float = option(
        0.05,  # FastCache's.
        number(more="; 0 never skips"),
        "epsilon: relative change of a span's input below which may be skipped (ratio); xDiT's "
        "`rel_l1_thresh`",
    )
    significance_level: float = option(
        0.05,
        number(0, 1, ends=False),
        "alpha of the test (ratio); smaller is safer with test='chi2'",
    )
    test: str = option(
        "chi2",
        choice("chi2", "conformal", "paper"),
        "chi2: equivalence test with a scale; conformal: alpha bounds the share of harmful skips, "
        "needs a calibration and is the default with one; paper: FastCache's literal rule, which "
        "accepts nearly any change below 100 %",
    )

    @property
    def needs(self) -> Collection[Capability]:
        """Only a calibration knows the conformal test's scale."""
        return {Capability.CALIBRATION} if self.test == "conformal" else ()

    @property
    def withholds(self) -> Collection[Capability]:
        """Epsilon bounds an error; and a calibration is for all tests but the paper's."""
        return {Capability.GATE_TO_CALIBRATE} if self.test == "paper" else ()

    def judge(self, evidence: Evidence, state: Any = None) -> Verdict:
        r"""Compare :math:`Q/R`, for `chi2` :math:`g^2 Q/R`, with its threshold."""
        if evidence.reference <= 0:
            return Verdict(None, 0.0)
        statistic = evidence.change / evidence.reference
        if self.cache_ratio_threshold == 0:
            return Verdict(statistic, 0.0)
        if self.test == "paper":
            degrees = float(evidence.tokens * evidence.dim)
            quantile = 2.0 * gammaincinv(degrees / 2, 1 - self.significance_level)
            return Verdict(statistic, float(quantile / degrees))
        if evidence.change_squared <= 0:
            # No token moved enough to stand out from the others.
            degrees = MAX_DEGREES_OF_FREEDOM
        else:
            degrees = evidence.change**2 / evidence.change_squared
            degrees = min(max(degrees, 1.0), MAX_DEGREES_OF_FREEDOM)
        statistic *= evidence.lag**2
        # The chi-square quantile, as SciPy's stats.chi2.ppf computes it, without its overhead.
        quantile = 2.0 * gammaincinv(degrees / 2, self.significance_level)
        return Verdict(statistic, float(self.cache_ratio_threshold**2 * quantile / degrees))

"""The gate that a calibration has made: thresholds for each step, age and spacing of anchors."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import gammaincinv

from xfuser_fastcache.fitted import Fitted
from xfuser_fastcache.gates.base import Evidence, Gate, Verdict


class CalibratedGate(Gate):
    r"""Skips where the error that a skip would make is predicted to stay below epsilon.

    A cell is a step of the plan, the lag `g` to the anchor and the lag `h` from there to the anchor
    before. In cell `c` the calibration left a slope :math:`k_c`: an upper quantile of true relative
    error over :math:`\delta = \sqrt{Q/R}`.

    - `test="conformal"`: skip when :math:`k_c \delta < \lambda \epsilon`, with the one scalar
      :math:`\lambda` that conformal risk control allows at alpha.
    - `test="chi2"`: skip when :math:`Q/R < (\epsilon/k_c)^2 \chi^2_{\nu_c,\alpha} / \nu_c` (lower
      quantile), :math:`\nu_c` matched to the cell's moments over generations.

    A cell that the calibration has not seen never skips.

    Args:
        fitted: what the calibration left.
        epsilon: largest relative error that does no harm, a ratio; 0 never skips.
        test: `"conformal"` or `"chi2"`.
        significance_level: alpha; with `"conformal"` one that is not the calibration's never skips.

    Source: docs/methods/statistics.md.
    """

    def __init__(self, fitted: Fitted, epsilon: float, test: str, significance_level: float):
        self.fitted = fitted
        self.epsilon = epsilon
        if test == "conformal":
            scale = fitted.scales.get(significance_level, 0.0)
            self.factors = np.full(fitted.slopes.shape, scale**2)
        else:
            # A statistic that did not vary has an infinite number of degrees of freedom.
            degrees = np.minimum(fitted.degrees, 1e9)
            self.factors = 2.0 * gammaincinv(degrees / 2, significance_level) / degrees

    def judge(self, evidence: Evidence, state: Any = None) -> Verdict:
        """Compare :math:`Q/R` with the cell's threshold."""
        if evidence.reference <= 0:
            return Verdict(None, 0.0)
        statistic = evidence.change / evidence.reference
        cell = self.fitted.cell(*evidence.noise_levels)
        if cell is None:
            return Verdict(statistic, 0.0)
        harmless = self.epsilon / float(self.fitted.slopes[cell])
        return Verdict(statistic, float(self.factors[cell]) * harmless**2)

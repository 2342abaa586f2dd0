"""The gate that a calibration has made: thresholds for each step, age and spacing of anchors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv

from xfuser_fastcache.artifacts.calibration import Fitted
from xfuser_fastcache.gates.base import Evidence, Gate, Verdict


@dataclass(frozen=True, eq=False)
class CalibratedGate(Gate):
    r"""Skips where the error that a skip would make is predicted to stay below epsilon.

    A cell is a step of the plan, the lag `g` to the anchor and the lag `h` from there to the anchor
    before. In cell `c` the calibration predicts the relative error
    :math:`e_c = k_c \delta^\gamma \rho^\kappa`, :math:`\delta = \sqrt{Q/R}` and :math:`\rho` the
    root mean square of the latents at the anchor, which true errors exceed as often as not.

    - `test="conformal"`: skip when :math:`e_c < \lambda \epsilon`, with the one scalar
      :math:`\lambda` that conformal risk control allows at alpha.
    - `test="chi2"`: skip when :math:`(u e_c)^2 < \epsilon^2 \chi^2_{\nu_c,\alpha} / \nu_c` (lower
      quantile), :math:`u` an upper quantile of true over predicted errors and :math:`\nu_c` matched
      to the prediction's moments over generations.

    A cell that the calibration has not seen never skips.

    Args:
        fitted: what the calibration left.
        epsilon: largest relative error that does no harm, a ratio; 0 never skips.
        test: `"conformal"` or `"chi2"`.
        significance_level: alpha; with `"conformal"` one that is not the calibration's never skips.

    Source: docs/methods/calibrated.md.
    """

    fitted: Fitted
    epsilon: float
    test: str
    significance_level: float
    # Largest predicted error that the test lets pass, by cell.
    limits: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        fitted = self.fitted
        if self.test == "conformal":
            scale = fitted.scales.get(self.significance_level, 0.0)
            limits = np.full(fitted.slopes.shape, scale * self.epsilon)
        else:
            # A statistic that did not vary has an infinite number of degrees of freedom.
            degrees = np.minimum(fitted.degrees, 1e9)
            factors = 2.0 * gammaincinv(degrees / 2, self.significance_level) / degrees
            limits = self.epsilon / fitted.upper * np.sqrt(factors)
        object.__setattr__(self, "limits", limits)

    def judge(self, evidence: Evidence, state: Any = None) -> Verdict:
        """Compare the predicted relative error with the largest that the test lets pass."""
        if evidence.reference <= 0:
            return Verdict(None, 0.0)
        cell = self.fitted.cell(*evidence.noise_levels)
        if cell is None:
            return Verdict(None, 0.0)
        change = evidence.change / evidence.reference
        energy = evidence.reference / (evidence.tokens * evidence.dim)
        predicted = self.fitted.predicted_error(cell, change, energy)
        return Verdict(predicted, 0.0 if predicted is None else float(self.limits[cell]))

"""AdaCache's gate: the rate of change picks how long a computed step serves."""

from __future__ import annotations

from collections.abc import Mapping

from xfuser_fastcache.gates.base import Evidence, Gate, Verdict
from xfuser_fastcache.measurements.probes import Probe


class CodebookGate(Gate):
    r"""Picks at each computed step after how many steps the next one is computed.

    With :math:`r` what the middle block adds, on image tokens, :math:`\bar r` what it added when it
    was computed before, `k` steps earlier, the rate of change is
    :math:`c = \sum |r - \bar r| \,/ (k \sum |\bar r|)`. The interval is that of the codebook's
    first entry above `c`, of its last one where there is none. The first two computed steps are
    neighbours: before two are known, the interval is 1.

    Args:
        codebook: upper end of a rate -> interval in steps. Intervals of 1 never skip.

    Example:
        >>> gate = CodebookGate({0.05: 6, 1.0: 2})
        >>> where = dict(change_squared=0.0, tokens=64, dim=32, noise_levels=(0.8, 0.9, None))
        >>> slow = Evidence(change=0.4, reference=10.0, lag=1, **where)
        >>> gate.update(gate.init(), slow, skipped=False), gate.judge(slow, 1).threshold
        (6, 6.0)

    Source: AdaCache, arXiv 2411.02397, and its codebooks as LightX2V publishes them. Deviation: the
    motion regularisation compares the frames of a video, of which a picture has one, so it is left
    out. Under PipeFusion a new interval is known one or two steps later; until then the last holds.
    """

    probe = Probe.MIDDLE_RESIDUAL
    asks_always = True

    def __init__(self, codebook: Mapping[float, int]):
        self.codebook = sorted(codebook.items())

    def init(self) -> int:
        """Compute the next step."""
        return 1

    def judge(self, evidence: Evidence, state: int | None = None) -> Verdict:
        """Compare the age of the anchor with the interval."""
        return Verdict(float(evidence.lag), float(self._interval(evidence, state or 1)))

    def update(self, state: int, evidence: Evidence, skipped: bool) -> int:
        """Keep the interval until a computed step has measured another."""
        return self._interval(evidence, state)

    def _interval(self, evidence: Evidence, last: int) -> int:
        change = evidence.relative_change
        if change is None:
            return last
        rate = change / evidence.gap
        above = (interval for end, interval in self.codebook if rate < end)
        return next(above, self.codebook[-1][1])

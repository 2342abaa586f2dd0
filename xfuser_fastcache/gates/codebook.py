"""AdaCache's gate: the rate of change picks how long a computed step serves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xfuser_fastcache.config.checks import LARGEST, Check, integer, number, option
from xfuser_fastcache.gates.base import Evidence, Gate, Verdict
from xfuser_fastcache.measurements.probes import Probe

# AdaCache, arXiv 2411.02397: upper end of a rate of change -> interval in steps. As in LightX2V.
CODEBOOKS: dict[str, dict[float, int]] = {
    "slow": {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.0: 3},
    "fast": {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.4: 2, 1.0: 1},
}


_END, _INTERVAL = number(), integer(1)


def read_codebook(given: Any) -> dict[float, int]:
    """Return a codebook by its name or its entries; a bare ValueError where that is none.

    Example:
        >>> read_codebook({"0.1": 4, 1: 2})
        {0.1: 4, 1.0: 2}
    """
    if isinstance(given, str):
        if given not in CODEBOOKS:
            raise ValueError
        return dict(CODEBOOKS[given])
    if not isinstance(given, dict) or not given:
        raise ValueError
    try:
        # JSON has text for keys.
        found = {
            (float(end) if isinstance(end, str) else _END.read(end)): _INTERVAL.read(interval)
            for end, interval in given.items()
        }
    except (TypeError, ValueError):
        raise ValueError from None
    if len(found) < len(given) or not all(0 < end <= LARGEST for end in found):
        raise ValueError
    return found


@dataclass(frozen=True)
class CodebookGate(Gate):
    r"""Picks at each computed step after how many steps the next one is computed.

    With :math:`r` what the middle block adds, on image tokens, :math:`\bar r` what it added when it
    was computed before, `k` steps earlier, the rate of change is
    :math:`c = \sum |r - \bar r| \,/ (k \sum |\bar r|)`. The interval is that of the codebook's
    first entry above `c`, of its last one where there is none. The first two computed steps are
    neighbours: before two are known, the interval is 1.

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

    codebook: dict[float, int] = option(
        "slow",
        Check(
            f"slow | fast, or mapping of 0 < number <= {LARGEST:g} to {_INTERVAL.allowed}",
            read_codebook,
        ),
        "upper end of a rate of change (ratio a step) -> steps to the next computed step; "
        "intervals of 1 never skip",
    )
    _entries: list[tuple[float, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_entries", sorted(self.codebook.items()))

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
        above = (interval for end, interval in self._entries if rate < end)
        return next(above, self._entries[-1][1])

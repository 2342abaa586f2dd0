"""First-Block-Cache's gate: how much what the first block adds has changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xfuser_fastcache.config.checks import number, option
from xfuser_fastcache.gates.base import Evidence, Gate, Verdict
from xfuser_fastcache.measurements.probes import Probe


@dataclass(frozen=True)
class FirstBlockGate(Gate):
    r"""Skips all blocks but the first where that one adds what it added before.

    With :math:`r` the first block's residual, on image tokens, and :math:`\bar r` that of the last
    step at which all was computed: skip when
    :math:`\sum |r - \bar r| \,/ \sum |\bar r| < threshold`.

    Example:
        >>> gate = FirstBlockGate(0.05)
        >>> where = dict(change_squared=0.0, tokens=64, dim=32, noise_levels=(0.8, 0.9, None))
        >>> near = Evidence(change=0.45, reference=10.0, lag=1, **where)
        >>> gate.judge(near).may_skip, FirstBlockGate(0.04).judge(near).may_skip
        (True, False)

    Source: First Block Cache of ParaAttention, as in diffusers `hooks/first_block_cache.py`.
    Deviations: at the threshold itself the original skips; warm-up, the last step and the longest
    run of skips are the engine's. Under PipeFusion the residual is that of the step before, brought
    to this step by the ratio of the gaps in noise level. xDiT's fbcache takes its reference by the
    decision of the step before; this one, as diffusers', by the step's own.
    """

    probe = Probe.FIRST_RESIDUAL

    cache_ratio_threshold: float = option(
        0.05,  # diffusers' FirstBlockCacheConfig's.
        number(more="; 0 never skips"),
        "relative change of the first block's residual below which may be skipped (ratio)",
    )

    def judge(self, evidence: Evidence, state: Any = None) -> Verdict:
        """Compare the relative L1 change with the threshold."""
        return Verdict(evidence.relative_change, self.cache_ratio_threshold)

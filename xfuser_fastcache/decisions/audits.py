"""Shadow audits: which skips are computed as well, and which of them did harm."""

from __future__ import annotations

import hashlib

from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.decisions.policy import Rules
from xfuser_fastcache.measurements.moments import Moments
from xfuser_fastcache.state.shared import Audit, SharedState


def audit_of(rules: Rules, shared: SharedState, call: Call, skip: list[bool]) -> Audit | None:
    """Return which skip of a step is audited, a function of its place and the flags alone.

    After the last step no vector would bring the error home.
    """
    skipped = [span for span, flag in enumerate(skip) if flag]
    if not skipped or rules.lag or call.is_last_step:
        return None
    place = f"{call.generation}/{call.step}".encode()
    draw = int.from_bytes(hashlib.sha256(place).digest()[:4], "big")
    if draw >= rules.config.shadow_audit * 2**32:
        return None
    span = skipped[draw % len(skipped)]
    # Of the order of what entered it, which this gate measures.
    group = next(i for i, group in enumerate(rules.groups) if group.span == span)
    return Audit(span, shared.groups[group].exponent)


def did_harm(error: Moments, threshold: float) -> bool:
    """Say whether an audited skip was wrong by the threshold or more, or by an unknown amount.

    Args:
        error: of what was put out, against what was computed.
        threshold: relative error from which on a skip does harm, a ratio.
    """
    limit = threshold**2 * error.reference
    small = error.change == 0 or error.change < limit
    return not small or bool(error.nonfinite or error.overflow)

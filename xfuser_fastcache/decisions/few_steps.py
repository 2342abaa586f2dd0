"""Says where a generation is such that the cache skips nothing in it, or cannot know its end.

Few steps are the usual way to the first. Distilled models take 4 to 9 of them. Warm-up and the last
step, which are computed, are then most, and between two steps most changes.
"""

from __future__ import annotations

import logging
from collections import Counter

from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.config.budget import never_skips
from xfuser_fastcache.decisions.log import DecisionLog
from xfuser_fastcache.decisions.policy import Rules

logger = logging.getLogger("xfuser_fastcache")

_NO_END = (
    "The number of steps is not known: %s computes its share of them without an end, perhaps not "
    "the last ones, on which much rests. Use the transformer within its pipeline, pass "
    "scheduler=..., or give num_steps. (Said once.)"
)


class FewSteps:
    """Warns as a generation begins that leaves nothing to skip, or ends without a skip.

    Once for each number of steps. Nothing is said where that was asked for, by a threshold of 0, a
    mask, or `enable_block_approx=False`; nor of a single step, as programs warm up by. Where the
    number of steps is not known, that is said of a budget.

    Args:
        rules: that decisions go by.
    """

    def __init__(self, rules: Rules):
        self._rules = rules
        config, schedule = rules.config, rules.schedule
        masked = schedule is not None and schedule.budget is None
        self._asked = not masked and config.enable_block_approx and not never_skips(config)
        self._done: set[int | None] = {1}

    def begin(self, call: Call) -> None:
        """Take in the first forward pass of a generation."""
        steps = call.steps
        if not self._asked or steps in self._done:
            return
        if steps is None:
            self._done.add(None)
            if self._rules.schedule is not None:
                logger.warning(_NO_END, self._rules.schedule.budget)
            return
        why = nothing_to_skip(self._rules, steps)
        if why is not None:
            self._say(f"Nothing will be skipped in {steps} steps: {why}.", steps)

    def end(self, call: Call, decisions: DecisionLog) -> None:
        """Take in the last forward pass of a generation, after its decisions."""
        steps = call.steps
        if not self._asked or steps is None or steps in self._done:
            return
        if any(flags for *_, flags in decisions.entries):
            self._done.add(steps)  # it can; another picture may do without
            return
        reasons = Counter(j.reason for d in decisions.decisions for j in d.judgements)
        found = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        self._say(f"Nothing was skipped in {steps} steps ({found}).", steps)

    def _say(self, what: str, steps: int) -> None:
        self._done.add(steps)
        enough = (
            f"To skip one step all the same, give computed_steps={steps - 1}, and compare pictures "
            "with those of fewer num_inference_steps: distilled models of 4 to 9 steps seldom bear "
            "a skip."
        )
        without = "At so few steps leave the cache out."
        logger.warning("%s %s (Said once.)", what, enough if steps > 2 else without)


def nothing_to_skip(rules: Rules, steps: int) -> str | None:
    """Return why none of so many steps can be skipped, whatever is measured; None where one can.

    Args:
        rules: that decisions go by.
        steps: of a generation.
    """
    if rules.schedule is not None:
        computed = 0 not in (rules.schedule.flags(steps) or ())
        return f"{rules.schedule.budget} computes all of them" if computed else None
    warm_up = rules.config.num_warmup_steps
    # An anchor comes first, and in a pipeline what is measured takes so many steps to arrive.
    first = max(warm_up, 1 + rules.lag)
    if steps > first + 1:
        return None
    reason = f"num_warmup_steps={warm_up}" if warm_up == first else "a pipeline's decisions lag"
    return f"the first {min(first, steps)} are computed ({reason}), and so is the last one"

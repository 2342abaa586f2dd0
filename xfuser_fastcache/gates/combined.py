"""Gates that decide together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from xfuser_fastcache.gates.base import Evidences, Rule, Verdict
from xfuser_fastcache.measurements.probes import Probe


class Combination(Rule):
    """What combinations share: each gate has its own probe and remembers for itself.

    All learn from each decision, whoever made it: where a span is skipped against a gate's advice,
    that gate goes on from there.

    Args:
        rules: gates, or combinations of gates; at least one.
    """

    def __init__(self, rules: Sequence[Rule]):
        self.rules = tuple(rules)

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Those of all gates, each once."""
        return tuple(dict.fromkeys(probe for rule in self.rules for probe in rule.probes))

    def init(self) -> tuple[Any, ...] | None:
        """What each remembers; None where none of them ever does."""
        states = tuple(rule.init() for rule in self.rules)
        return None if all(state is None for state in states) else states

    def weigh(self, evidence: Evidences, state: tuple[Any, ...] | None) -> Verdict | None:
        """Ask all gates."""
        states = state or (None,) * len(self.rules)
        pairs = zip(self.rules, states, strict=True)
        return self.combined([rule.weigh(evidence, own) for rule, own in pairs])

    def learn(self, state: tuple[Any, ...], evidence: Evidences, skipped: bool) -> tuple[Any, ...]:
        """Let each learn."""
        pairs = zip(self.rules, state, strict=True)
        return tuple(rule.learn(own, evidence, skipped) for rule, own in pairs)

    @abstractmethod
    def combined(self, verdicts: list[Verdict | None]) -> Verdict | None:
        """Return the verdict that settles it, for the trace; None where none can be given."""


class AllOf(Combination):
    """Skips where every gate would; a gate that cannot say is one that would not.

    Example:
        >>> together = AllOf([])
        >>> near, far = Verdict(0.1, 0.2), Verdict(0.3, 0.2)
        >>> together.combined([near, far]) == far, together.combined([near, None]) is None
        (True, True)
    """

    def combined(self, verdicts: list[Verdict | None]) -> Verdict | None:
        """Return the first verdict against skipping, else the first one."""
        known = [verdict for verdict in verdicts if verdict is not None]
        if len(known) < len(verdicts):
            return None
        return next((verdict for verdict in known if not verdict.may_skip), known[0])


class AnyOf(Combination):
    """Skips where one gate would.

    Example:
        >>> together = AnyOf([])
        >>> near, far = Verdict(0.1, 0.2), Verdict(0.3, 0.2)
        >>> together.combined([far, near]) == near, together.combined([None, far]) == far
        (True, True)
    """

    def combined(self, verdicts: list[Verdict | None]) -> Verdict | None:
        """Return the first verdict for skipping, else the first one that there is."""
        known = [verdict for verdict in verdicts if verdict is not None]
        first = known[0] if known else None
        return next((verdict for verdict in known if verdict.may_skip), first)

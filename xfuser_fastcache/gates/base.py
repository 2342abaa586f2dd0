"""What a gate is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from xfuser_fastcache.config.capabilities import Capability
from xfuser_fastcache.config.checks import CheckedOptions
from xfuser_fastcache.measurements.probes import Probe


@dataclass(frozen=True)
class Evidence:
    """What all ranks know of what a gate's probe measures, brought to the step that is decided.

    Sizes are squared L2 norms or L1 norms, by the probe.

    Attributes:
        change: Q, sum over tokens of the size of the change against the reference.
        change_squared: sum over tokens of the squared sizes of the change.
        reference: R, sum over tokens of the size of the reference.
        tokens: image tokens, over batch and ranks; 0 where nothing was measured.
        dim: width of a token.
        lag: steps since the span was last computed.
        noise_levels: of the step that is decided, of the anchor, and of the one before the anchor;
            the latter None where there is none.
        gap: steps between the measured step and the one that it was measured against.
        elapsed: how far the plan has gone at the step that is decided, from 0 at its first step to
            1 at its last; None if unknown.
    """

    change: float
    change_squared: float
    reference: float
    tokens: int
    dim: int
    lag: int
    noise_levels: tuple[float, float, float | None]
    gap: int = 1
    elapsed: float | None = None

    @property
    def relative_change(self) -> float | None:
        """Q / R; None where there is nothing to compare with."""
        return self.change / self.reference if self.reference > 0 else None


@dataclass(frozen=True)
class Verdict:
    """What a gate says of one span: it may be skipped where the statistic is below the threshold.

    Attributes:
        statistic: what was tested; None where there is nothing to compare with.
        threshold: 0 where nothing may pass.
    """

    statistic: float | None
    threshold: float

    @property
    def may_skip(self) -> bool:
        """Whether the evidence rejects "skipping does harm"."""
        return self.statistic is not None and self.statistic < self.threshold


# Evidence by probe; under None what needs no measurement, for gates that count steps.
Evidences = Mapping[Probe | None, Evidence]


class Rule(ABC):
    """One gate, or several that decide together: what the engine asks.

    It sees no tensor, and what it remembers from step to step is a value that `learn` returns: kept
    for each branch and span, forgotten with the generation, and a function of evidence alone. Then
    ranks that are given the same evidence cannot decide differently.
    """

    @property
    @abstractmethod
    def probes(self) -> tuple[Probe, ...]:
        """What is measured for it, each once."""

    def init(self) -> Any:
        """Return what is remembered at the beginning of a generation; None for nothing ever."""
        return None

    @abstractmethod
    def weigh(self, evidence: Evidences, state: Any) -> Verdict | None:
        """Weigh the evidence of one span; None where it cannot, for want of any."""

    @abstractmethod
    def learn(self, state: Any, evidence: Evidences, skipped: bool) -> Any:
        """Return what is remembered after a decision; see `Gate.update`."""


class Companions(NamedTuple):
    """What a gate brings where it is the backend, by its source or by measurement.

    Attributes:
        forecaster: by name.
        num_warmup_steps: first steps that are always computed.
        max_consecutive_skips: None for no limit.
        budgeted: forecaster by name with a budget, where nothing needs single blocks; None for the
            same.
        quality: the budget where nothing says which steps are computed; None where the gate decides
            then.
    """

    forecaster: str = "reuse"
    num_warmup_steps: int = 1
    max_consecutive_skips: int | None = None
    budgeted: str | None = None
    quality: str | None = None


class Gate(CheckedOptions, Rule):
    """Says whether a span may be skipped, as a pure function of evidence that all ranks share.

    A subclass is a frozen dataclass of its options (`config.checks.option`), which `CacheConfig`
    takes flat too. It has `judge` and, where it remembers something, `init` and `update`.
    Comparisons are strict, so a threshold of 0 never skips.

    Attributes:
        probe: what is measured for it; None for a gate that needs no measurement.
        asks_always: whether it is asked also where nothing was measured.
        companions: what goes with it where it is the backend.
    """

    probe: ClassVar[Probe | None] = Probe.SPAN_INPUT
    asks_always: ClassVar[bool] = False
    companions: ClassVar[Companions] = Companions()

    @property
    def needs(self) -> Collection[Capability]:
        """Capabilities that follow from what is measured; see `config.capabilities`."""
        needed = set()
        if self.probe not in (None, Probe.SPAN_INPUT):
            needed.add(Capability.BLOCKS)
        if self.probe is Probe.MIDDLE_RESIDUAL:
            needed.add(Capability.ALL_TOKENS)
        return needed

    @property
    def withholds(self) -> Collection[Capability]:
        """Capabilities that nobody has beside it; a threshold is no error unless a gate says so.

        The first block is a span of its own where it is looked at.
        """
        withheld = {Capability.GATE_TO_CALIBRATE, Capability.ERROR_BOUND}
        return withheld | (
            {Capability.WHOLE_STACK} if self.probe is Probe.FIRST_RESIDUAL else set()
        )

    def on_model(self, polynomial: list[float] | None) -> Gate:
        """Return the gate for a model.

        Args:
            polynomial: from relative change of the modulated input to that of the output, highest
                power first, as published for the model; None for none.
        """
        return self

    @abstractmethod
    def judge(self, evidence: Evidence, state: Any = None) -> Verdict:
        """Weigh the evidence of one span."""

    def update(self, state: Any, evidence: Evidence, skipped: bool) -> Any:
        """Return what is remembered after a decision.

        Args:
            state: what was remembered before it.
            evidence: that it rested on; `tokens` is 0 where nothing was measured.
            skipped: whether the span is skipped, which may have other reasons than the gate's.
        """
        return state

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Its one probe, if any."""
        return () if self.probe is None else (self.probe,)

    def weigh(self, evidence: Evidences, state: Any) -> Verdict | None:
        """Judge by the evidence of its probe."""
        found = evidence[self.probe]
        if found.tokens == 0 and not self.asks_always:
            return None
        return self.judge(found, state)

    def learn(self, state: Any, evidence: Evidences, skipped: bool) -> Any:
        """Update by the evidence of its probe."""
        return self.update(state, evidence[self.probe], skipped)

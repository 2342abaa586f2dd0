"""What the engine asks of the tokens of a computed span, and the answer where all of them run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

import torch

from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.measurements.moments import Reference
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import ForwardContract
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.reports.statistics import Counters
from xfuser_fastcache.state.local import Anchor, Memory
from xfuser_fastcache.state.shared import StepPlan
from xfuser_fastcache.tokens.saliency import MotionStatic


class TokenPlan(ABC):
    """What the engine asks of the tokens of a computed span."""

    # How many tokens move is agreed on by this; None where none are counted.
    motion: MotionStatic | None = None

    @property
    def edges(self) -> int:
        """Number of saliencies at which tokens are counted."""
        return 0 if self.motion is None else len(self.motion.edges)

    @property
    @abstractmethod
    def measures(self) -> bool:
        """Whether `measure` needs what tokens were when they were last computed."""

    @property
    @abstractmethod
    def hooks_attention(self) -> bool:
        """Whether attention modules run through `run_attention`."""

    @property
    @abstractmethod
    def splits(self) -> bool:
        """Whether static tokens are left out of the span that is being computed."""

    @abstractmethod
    def open_step(self, starts_generation: bool) -> None:
        """Forget the step before, or the whole generation."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held for static tokens."""

    @abstractmethod
    def measure(
        self, hidden_states: torch.Tensor, reference: Reference | None, slots: torch.Tensor
    ) -> None:
        """Measure what entered the first span that is not always computed.

        Args:
            hidden_states: `(batch, tokens, dim)`.
            reference: what each token was when it was last computed; where `measures`.
            slots: of this rank's token counts, int64, `edges` of them.
        """

    @abstractmethod
    def enter(self, step_plan: StepPlan, memory: Memory) -> None:
        """Choose the tokens of a span that is about to be computed.

        Args:
            step_plan: of this step.
            memory: of the span.
        """

    @abstractmethod
    def run_block(
        self,
        index: int,
        contract: BlockContract | ForwardContract,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        counters: Counters,
    ) -> Any:
        """Run a block of a computed span; arguments as of `CacheEngine.run_block`."""

    @abstractmethod
    def run_attention(
        self,
        key: Hashable,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an attention module of a block; `key` names it and the branch."""

    @abstractmethod
    def leave(
        self, inputs: Streams, outputs: Streams, memory: Memory, noise_level: float
    ) -> Streams:
        """Return a span's output: computed tokens as they left it, static ones moved as when they
        were last computed.

        Args:
            inputs: what entered the span.
            outputs: of its last block.
            memory: of the span before this step.
            noise_level: sigma of this step.
        """

    @abstractmethod
    def static_multiply_adds(self, inputs: Streams) -> float:
        """Return what forecasting static tokens costs, the mean over the tokens of all streams.

        Args:
            inputs: what entered the span.
        """

    @abstractmethod
    def remembered(self, memory: Memory, anchor: Anchor, forecaster: Forecaster) -> Memory:
        """Return a span's memory after it was computed.

        Args:
            memory: of the span before the step.
            anchor: as if all tokens had been computed.
            forecaster: whose memory it is.
        """


class NoTokenPlan(TokenPlan):
    """All tokens run, always."""

    measures = hooks_attention = splits = False

    def open_step(self, starts_generation: bool) -> None:
        """Nothing to forget."""

    def nbytes(self) -> int:
        """Nothing held."""
        return 0

    def measure(
        self, hidden_states: torch.Tensor, reference: Reference | None, slots: torch.Tensor
    ) -> None:
        """Nothing to measure."""

    def enter(self, step_plan: StepPlan, memory: Memory) -> None:
        """Nothing to choose."""

    def run_block(
        self,
        index: int,
        contract: BlockContract | ForwardContract,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        counters: Counters,
    ) -> Any:
        """Run the block as it is."""
        return forward(*args, **kwargs)

    def run_attention(
        self,
        key: Hashable,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the module as it is."""
        return forward(*args, **kwargs)

    def leave(
        self, inputs: Streams, outputs: Streams, memory: Memory, noise_level: float
    ) -> Streams:
        """Return the output as it is."""
        return outputs

    def static_multiply_adds(self, inputs: Streams) -> float:
        """No token is static."""
        return 0.0

    def remembered(self, memory: Memory, anchor: Anchor, forecaster: Forecaster) -> Memory:
        """All tokens share the anchor."""
        return forecaster.update(memory, anchor)

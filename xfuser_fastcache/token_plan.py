"""The token plan of one transformer: which tokens its computed spans run on, step by step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from xfuser_fastcache.block_contract import BlockContract, Streams
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.moments import Reference
from xfuser_fastcache.state import Anchor, Memory, Orders
from xfuser_fastcache.statistics import Counters
from xfuser_fastcache.tokens.attention import StaticTokens
from xfuser_fastcache.tokens.base import run_narrowed
from xfuser_fastcache.tokens.saliency import (
    MotionRule,
    Split,
    bucket,
    counts_above,
    token_saliency,
)

# FastCache's own is 0.1, in no unit; docs/methods/tokens.md has what was measured.
MOTION_THRESHOLD = 0.01


class TokenPlan:
    """Chooses the tokens of each computed span, and puts all of them together again behind it.

    What entered the first span says which tokens moved; all ranks agree on how many run, and each
    takes its own that moved most. A static token gets the residual of when it was last computed.
    Text always runs.

    Args:
        motion: how motion is told from stillness.
        contracts: of all blocks, in order.
        attention_costs: share of each block's cost that its attention modules have, 0 to 1, where
            static tokens stay in attention; None where they do not.
    """

    def __init__(
        self,
        motion: MotionRule,
        contracts: Sequence[BlockContract],
        attention_costs: Sequence[float] | None = None,
    ):
        self.motion = motion
        self._attention_costs = attention_costs
        self._static = StaticTokens() if attention_costs is not None else None
        self._tokens = 0
        # A table's row is one for the whole batch, and so is then the choice.
        self._same_rows = any(contract.tables for contract in contracts)
        self._edges = torch.tensor(motion.edges)
        self._saliency: torch.Tensor | None = None
        self._split: Split | None = None

    @property
    def hooks_attention(self) -> bool:
        """Whether attention modules run through `run_attention`."""
        return self._static is not None

    def open_step(self, starts_generation: bool) -> None:
        """Forget the step before, or the whole generation."""
        self._saliency = self._split = None
        if starts_generation and self._static is not None:
            self._static.forget()

    def nbytes(self) -> int:
        """Bytes held for static tokens."""
        return 0 if self._static is None else self._static.nbytes()

    def measure(
        self, hidden_states: torch.Tensor, reference: Reference, slots: torch.Tensor, rank: int
    ) -> None:
        """Measure what entered the first span.

        Args:
            hidden_states: `(batch, tokens, dim)`.
            reference: what each token was when it was last computed.
            slots: of all ranks' token counts, int64.
            rank: this one's place in the group.
        """
        saliency = token_saliency(hidden_states, reference)
        if self._same_rows:
            saliency = saliency.amax(dim=0, keepdim=True)
        self._saliency = saliency
        self._edges = self._edges.to(saliency.device)
        own = slots[rank * len(self._edges) :][: len(self._edges)]
        own.add_(counts_above(saliency, self._edges))

    def enter(self, orders: Orders, memory: Memory) -> None:
        """Choose the tokens of a span that is about to be computed.

        Args:
            orders: of this step.
            memory: of the span.
        """
        self._split = None
        # A span whose output was not seen has nothing that static tokens could take.
        if orders.moving is None or self._saliency is None or not memory.anchors:
            return
        tokens = self._saliency.shape[1]
        count = bucket(orders.moving, tokens)
        if count < tokens:
            self._split = Split(self._saliency, count)

    @property
    def narrows(self) -> bool:
        """Whether the span that is being computed runs on fewer tokens."""
        return self._split is not None

    def run_block(
        self,
        index: int,
        contract: BlockContract,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        counters: Counters,
    ) -> Any:
        """Run a block of a computed span; arguments as of `CacheEngine.run_block`."""
        inputs = contract.read(args, kwargs)
        self._tokens, text = inputs.hidden_states.shape[1], inputs.encoder_hidden_states
        if self._split is None:
            return forward(*args, **kwargs)
        left_out = 1 - self._split.rows.shape[1] / self._tokens
        # Tokens are taken to cost alike.
        saved = left_out * self._tokens / (self._tokens + (0 if text is None else text.shape[1]))
        if self._attention_costs is not None:
            saved *= 1 - self._attention_costs[index]
        counters.record_narrowed(index, left_out, saved)
        slice_tables = self._static is None
        return run_narrowed(self._split, contract, forward, args, kwargs, slice_tables)

    def run_attention(
        self,
        key: Hashable,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an attention module of a block; `key` names it and the branch."""
        assert self._static is not None
        return self._static.attend(key, self._split, self._tokens, forward, args, kwargs)

    def leave(self, inputs: Streams, outputs: Streams, memory: Memory) -> Streams:
        """Return a span's output: computed tokens as they left it, static ones moved as before.

        Args:
            inputs: what entered the span.
            outputs: of its last block.
            memory: of the span before this step.
        """
        assert self._split is not None
        static = inputs.hidden_states + memory.anchors[0].residual.hidden_states
        image = self._split.mixed(outputs.hidden_states, static)
        return Streams(image, outputs.encoder_hidden_states)

    def remembered(self, memory: Memory, anchor: Anchor, forecaster: Forecaster) -> Memory:
        """Return a span's memory after it ran on some tokens: each token keeps its own anchors.

        Args:
            memory: of the span before the step.
            anchor: as if all tokens had been computed.
            forecaster: whose memory it is.
        """
        old = memory.anchors
        updated = forecaster.update(memory, self._mixed(anchor, old[0]))
        older = [
            self._mixed(now, old[min(age, len(old) - 1)])
            for age, now in enumerate(updated.anchors[1:], start=1)
        ]
        return replace(updated, anchors=(updated.anchors[0], *older))

    def _mixed(self, now: Anchor, before: Anchor) -> Anchor:
        """Return an anchor that is `now` of computed tokens and text, `before` of static tokens."""
        assert self._split is not None
        mixed = self._split.mixed

        def streams(new: Streams, old: Streams) -> Streams:
            image = mixed(new.hidden_states, old.hidden_states)
            return Streams(image, new.encoder_hidden_states)

        inputs = streams(now.inputs, before.inputs)
        energy = mixed(now.reference.energy[..., None], before.reference.energy[..., None])
        return Anchor(
            noise_level=now.noise_level,
            inputs=inputs,
            residual=streams(now.residual, before.residual),
            reference=Reference(inputs.hidden_states, energy[..., 0]),
            levels=mixed(_levels(now), _levels(before)),
        )


def _levels(anchor: Anchor) -> torch.Tensor:
    """Return the noise level at which each image token was computed, `(batch, tokens, 1)`."""
    if anchor.levels is not None:
        return anchor.levels
    return torch.full_like(anchor.reference.energy[..., None], anchor.noise_level)


def token_plan(
    config: CacheConfig, contracts: Sequence[BlockContract], attention_costs: Sequence[float]
) -> TokenPlan | None:
    """Return the plan that a config asks for, or None.

    Args:
        config: validated options.
        contracts: of all blocks, in order.
        attention_costs: share of each block's cost that its attention modules have, 0 to 1.
    """
    if not config.splits_tokens:
        return None
    if config.adaptive_beta is not None:
        b0, b1, b2, b3 = config.adaptive_beta
        rule = MotionRule(0.0, (b0, b1, b2, b3))
    else:
        given = config.motion_threshold
        rule = MotionRule(MOTION_THRESHOLD if given is None else given)
    return TokenPlan(rule, contracts, None if config.static_kv == "drop" else attention_costs)

"""The token plan of one transformer: which tokens its computed spans run on, step by step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from xfuser_fastcache.artifacts.linear_map import SpanMaps
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.measurements.moments import Reference
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import ForwardContract
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.models.token_layout import TokenCounts
from xfuser_fastcache.reports.statistics import Counters
from xfuser_fastcache.state.local import Anchor, Memory
from xfuser_fastcache.state.shared import StepPlan
from xfuser_fastcache.tokens.attention import StaticTokens
from xfuser_fastcache.tokens.base import Chain, Narrowing, TokenMethod, run_narrowed
from xfuser_fastcache.tokens.interface import NoTokenPlan, TokenPlan
from xfuser_fastcache.tokens.saliency import (
    MotionStatic,
    Split,
    bucket,
    counts_above,
    token_saliency,
)

logger = logging.getLogger("xfuser_fastcache")


@cache
def _say_uneven() -> None:
    logger.warning(
        "Token plans do nothing here: ranks that share the tokens hold different numbers of them, "
        "since tokens of a condition or padding are among them, and attention needs equally many. "
        "motion_static with static_kv='reuse' works, by itself. (Said once.)"
    )


class ChosenTokens(TokenPlan):
    """Chooses the tokens of each computed span, and puts all of them together again behind it.

    Split: what entered the first span that is not always computed says which tokens moved; all
    ranks agree on how many run, and each takes its own that moved most. A static token gets the
    residual of when it was last computed, corrected by a linear map where one was fitted. Merging:
    of the tokens that run, the later stages see clusters, in fixed numbers, so that ranks agree
    without a word. Text always runs.

    Args:
        methods: that choose tokens; at most one of them by their motion.
        contracts: of all blocks, in order.
        attention_costs: share of each block's cost that its attention modules have, 0 to 1.
        maps: of the whole stack, for static tokens: `r = r_0 + L(x - x_0)`, of the forecaster
            `linear`; None for none.
    """

    measures = True

    def __init__(
        self,
        methods: Sequence[TokenMethod],
        contracts: Sequence[BlockContract],
        attention_costs: Sequence[float],
        maps: SpanMaps | None = None,
    ):
        self.motion = next((m for m in methods if isinstance(m, MotionStatic)), None)
        self._methods = methods
        self._blocks = len(contracts)
        self._counts = contracts[0].counts or TokenCounts()
        self._attention_costs = attention_costs
        self._maps = maps
        keeps = self.motion is not None and self.motion.static_kv == "reuse"
        self._static = StaticTokens() if keeps else None
        # A table's row is one for the whole batch, and so is then the choice.
        self._same_rows = any(contract.tables for contract in contracts)
        self._edges = torch.tensor(() if self.motion is None else self.motion.edges)
        self._tokens = self._behind = 0
        self._saliency: torch.Tensor | None = None
        # Of the span that is being computed; of each method, the narrowings in force.
        self._narrows = False
        self._split: Split | None = None
        self._links: list[Narrowing] = []
        self._in_force = [0] * len(methods)
        self._narrowing: Narrowing | None = None

    @property
    def hooks_attention(self) -> bool:
        """Whether attention modules run through `run_attention`."""
        return self._static is not None

    def open_step(self, starts_generation: bool) -> None:
        """Forget the step before, or the whole generation."""
        self._saliency = self._split = self._narrowing = None
        self._links = []
        if starts_generation and self._static is not None:
            self._static.forget()

    def nbytes(self) -> int:
        """Bytes held for static tokens."""
        return sum(held.nbytes() for held in (self._static, self._maps) if held is not None)

    def measure(
        self, hidden_states: torch.Tensor, reference: Reference | None, slots: torch.Tensor
    ) -> None:
        """Measure the saliency of each token, and count those that reach each edge."""
        assert reference is not None
        self._saliency = token_saliency(hidden_states, reference)
        self._edges = self._edges.to(hidden_states.device)
        slots.add_(counts_above(self._common(self._saliency), self._edges))

    def _common(self, saliency: torch.Tensor) -> torch.Tensor:
        """Return the largest saliency of any item, where all items take the same tokens."""
        return saliency.amax(dim=0, keepdim=True) if self._same_rows else saliency

    def enter(self, step_plan: StepPlan, memory: Memory) -> None:
        """Take those that moved most, as many as move where most do."""
        self._split, self._links, self._narrowing = None, [], None
        self._in_force = [0] * len(self._methods)
        # A span whose output was not seen has nothing that static tokens could take.
        known = self._saliency is not None and bool(memory.anchors)
        self._narrows = known and not step_plan.all_tokens
        if self._narrows and self._static is None and self._counts.are_uneven:
            # In attention the ranks exchange their tokens, and have to run equally many.
            self._narrows = False
            _say_uneven()
        if self._narrows and self.motion is not None:
            assert self._saliency is not None
            tokens = self._saliency.shape[1]
            count = bucket(step_plan.moving, tokens)
            if count < tokens:
                self._split = Split(self._common(self._saliency), count)
                self._links.append(self._split)

    @property
    def splits(self) -> bool:
        """Whether static tokens are left out of the span that is being computed."""
        return self._split is not None

    def _choose(self, index: int, x: torch.Tensor) -> Narrowing | None:
        """Return the tokens that a block runs on; None for all.

        Args:
            index: of the block.
            x: what enters it, `(batch, tokens, dim)`.
        """
        for place, method in enumerate(self._methods if self._narrows else ()):
            while self._in_force[place] < method.links_at(index, self._blocks):
                assert self._saliency is not None
                # Of a token that was all zero it may be infinite.
                few, change = x, self._saliency.sqrt().clamp(max=1e6)[..., None]
                for link in self._links:
                    few, change = link.narrow(few), link.narrow(change)
                self._links.append(method.link(few, change[..., 0], self._same_rows))
                self._in_force[place] += 1
        return Chain(self._links) if self._links else None

    def run_block(
        self,
        index: int,
        contract: BlockContract | ForwardContract,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        counters: Counters,
    ) -> Any:
        """Run a block on the tokens that are chosen for it."""
        assert isinstance(contract, BlockContract)
        inputs = contract.read(args, kwargs)
        self._tokens, text = inputs.hidden_states.shape[1], inputs.encoder_hidden_states
        self._behind = contract.layout.behind(inputs)
        self._narrowing = self._choose(index, inputs.hidden_states)
        if self._narrowing is None:
            return forward(*args, **kwargs)
        left_out = 1 - self._narrowing.rows.shape[1] / self._tokens
        # Tokens are taken to cost alike.
        saved = left_out * self._tokens / (self._tokens + (0 if text is None else text.shape[1]))
        if self._static is not None:
            saved *= 1 - self._attention_costs[index]
        counters.record_narrowed(index, left_out, saved)
        attends_to_few = self._static is None
        return run_narrowed(self._narrowing, contract, forward, args, kwargs, attends_to_few)

    def run_attention(
        self,
        key: Hashable,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an attention module on static tokens too, as they were."""
        assert self._static is not None
        counts = self._tokens, self._behind
        return self._static.attend(key, self._narrowing, counts, forward, args, kwargs)

    def leave(
        self, inputs: Streams, outputs: Streams, memory: Memory, noise_level: float
    ) -> Streams:
        """Put computed and static tokens together again, the latter with the map of their age."""
        assert self._split is not None
        anchor = memory.anchors[0]
        static = inputs.hidden_states + anchor.residual.hidden_states
        if self._maps is not None:
            dx = inputs.hidden_states - anchor.inputs.hidden_states
            static += self._maps.change_of_each(dx, (noise_level - _levels(anchor)).abs())
        image = self._split.mixed(outputs.hidden_states, static)
        return replace(outputs, hidden_states=image)

    def static_multiply_adds(self, inputs: Streams) -> float:
        """Return what the maps of static tokens cost."""
        return 0.0 if self._maps is None else self._maps.multiply_adds_of_each(inputs)

    def remembered(self, memory: Memory, anchor: Anchor, forecaster: Forecaster) -> Memory:
        """Keep of each token its own anchors."""
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
            return replace(new, hidden_states=image)

        inputs = streams(now.inputs, before.inputs)
        assert now.reference is not None and before.reference is not None
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
    x = anchor.inputs.hidden_states
    return x.new_full((*x.shape[:2], 1), anchor.noise_level, dtype=torch.float32)


def token_plan(
    methods: Sequence[TokenMethod],
    contracts: Sequence[BlockContract],
    attention_costs: Sequence[float],
    maps: SpanMaps | None = None,
) -> TokenPlan:
    """Return the plan of the methods that a config asks for; arguments as of `ChosenTokens`."""
    return ChosenTokens(methods, contracts, attention_costs, maps) if methods else NoTokenPlan()

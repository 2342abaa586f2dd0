"""Arithmetic blocks whose outputs prove which path ran, under an engine and without a transformer.

The clock is given what a transformer's hook would read: see `arrival`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from xfuser_fastcache import CacheConfig
from xfuser_fastcache.artifacts.calibration import Fitted
from xfuser_fastcache.backends import forecaster_of, gate_of
from xfuser_fastcache.blueprint import Blueprint
from xfuser_fastcache.clock.clock import Clock
from xfuser_fastcache.clock.plan import Plan
from xfuser_fastcache.clock.sources import Arrival
from xfuser_fastcache.consensus.collective import BlockList, Consensus
from xfuser_fastcache.consensus.topology import DecisionGroup, Position
from xfuser_fastcache.engine import CacheEngine
from xfuser_fastcache.gates.base import Rule
from xfuser_fastcache.measurements.probes import Probe
from xfuser_fastcache.models.adapter import Step
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import ForwardContract
from xfuser_fastcache.models.spans import span_of_blocks
from xfuser_fastcache.models.streams import ENCODER, HIDDEN
from xfuser_fastcache.reports.statistics import BlockInfo
from xfuser_fastcache.tokens.interface import NoTokenPlan, TokenPlan

EVER = 1e6  # A threshold that any change stays below.
TOKENS, DIM = 6, 4
WHOLE = Position()
PATCHES = (2, 4)
BARE = BlockContract(parameters=(HIDDEN,), returns=(HIDDEN,))
JOINT = BlockContract(parameters=(HIDDEN, ENCODER), returns=(ENCODER, HIDDEN))


def config_of(**options: Any) -> CacheConfig:
    """Return options as an engine is given them."""
    return CacheConfig(**options).resolved()


def ones(value: float = 1.0) -> torch.Tensor:
    """Return `(1, TOKENS, DIM)` of one value, a tensor of its own."""
    return torch.full((1, TOKENS, DIM), value)


def plan_of(*levels: float) -> Plan:
    """Return a new plan, as `set_timesteps` makes one; its timesteps are noise levels."""
    return Plan(torch.tensor(levels), tuple(Step(level, level) for level in levels))


def arrival(level: float, latents: torch.Tensor | None = None, **given: Any) -> Arrival:
    """Return a forward pass whose timestep is its noise level, exactly.

    Args:
        level: of noise.
        latents: that it is given; a tensor of its own by default.
        **given: other attributes of an `Arrival`.
    """
    latents = ones() if latents is None else latents

    def read() -> torch.Tensor:
        return torch.tensor(level, dtype=torch.float64)

    # A patch belongs to the picture that all patches make.
    tokens = sum(given.get("position", WHOLE).patch_tokens) or latents.shape[1:]
    given = {"shape": (latents.shape[0], tokens), **given}
    return Arrival(latents=latents, read_timestep=read, noise_level_of=float, **given)


def engine_of(
    config: CacheConfig,
    contracts: Sequence[BlockContract | ForwardContract],
    blocks: int,
    group: DecisionGroup | None = None,
    held: tuple[int, ...] | None = None,
    **parts: Any,
) -> CacheEngine:
    """Return the engine of one process, which may stand for one stage of a pipeline.

    Args:
        config: of the cache.
        contracts: of the blocks that this process holds.
        blocks: of the whole model; each costs the same.
        group: place of the process; alone by default.
        held: blocks of each pipeline stage; all in one by default.
        **parts: of the blueprint: a gate, a calibration, a token plan.
    """
    group, held = group or DecisionGroup(), held or (blocks,)
    fitted = parts.get("fitted")
    gate = parts.get("gate") or gate_of(config, fitted)
    spans = span_of_blocks(blocks, config.granularity, Probe.FIRST_RESIDUAL in gate.probes)
    stage = min(group.stage, len(held) - 1)
    consensus = Consensus(
        group,
        backend="gloo",
        timeout_s=60.0,
        config_digest=config.digest(),
        block_lists=(BlockList(held[stage], 1),),
    )
    consensus.stages = [[BlockList(count, 1)] for count in held]
    plan = Blueprint(
        config=config,
        contracts=contracts,
        forecaster=forecaster_of(config, fitted, group),
        blocks=[BlockInfo(f"blocks.{i}", span, 1 / blocks) for i, span in enumerate(spans)],
        first_block=sum(held[:stage]),
        modulated=lambda args, kwargs: args[0],
        **{"dim": DIM, **parts, "gate": gate},
    )
    return CacheEngine(plan, consensus, Clock(config.num_steps))


class Stack:
    """Blocks that add one number each, run by an engine as a transformer's hooks would.

    Args:
        blocks: of the whole model.
        group: place of the process; alone by default.
        held: blocks of each pipeline stage; this process runs those of its own. All in one by
            default.
        rule: that decides; by default the gate that the options ask for.
        **options: of the config; it skips whatever may be skipped by default, and reuses.

    Attributes:
        added: what each of this process's blocks adds.
        ran: blocks that ran in the last forward pass.
    """

    contract = BARE

    def __init__(
        self,
        blocks: int = 4,
        group: DecisionGroup | None = None,
        held: tuple[int, ...] | None = None,
        rule: Rule | None = None,
        **options: Any,
    ):
        if options.get("use_cache", "Fast") == "Fast":
            options = {"cache_ratio_threshold": EVER, **options}
        config = config_of(**{"forecaster": "reuse", **options})
        own = held[group.stage] if held and group else blocks
        contracts, tokens = [self.contract] * own, self.tokens(config, own)
        self.engine = engine_of(config, contracts, blocks, group, held, gate=rule, tokens=tokens)
        self.consensus = self.engine.consensus
        self.added = [0.0] * own
        self.ran: list[int] = []

    def tokens(self, config: CacheConfig, blocks: int) -> NoTokenPlan | TokenPlan:
        """Return the token plan of so many blocks; none here."""
        return NoTokenPlan()

    def open(self, level: float, latents: torch.Tensor | None = None, **given: Any) -> None:
        """Begin a forward pass; see `arrival`."""
        self.engine.open(arrival(level, latents, **given))

    def block(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the forward of a block."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            self.ran.append(index)
            return x + self.added[index]

        return forward

    def run(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Run a block through the engine."""
        return self.engine.run_block(index, self.block(index), (x,), {})

    def __call__(
        self,
        x: torch.Tensor,
        level: float,
        position: Position = WHOLE,
        left_out: int | None = None,
        **given: Any,
    ) -> torch.Tensor:
        """Run a forward pass.

        Args:
            x: latents, and what the first block is given.
            level: of noise.
            position: which tokens these are.
            left_out: a block that the model does not call.
            **given: see `arrival`.
        """
        self.ran = []
        self.open(level, x, position=position, **given)
        for index in range(len(self.added)):
            if index != left_out:
                x = self.run(index, x)
        self.engine.close()
        return x

    def pipelined(self, x: torch.Tensor, level: float, patched: bool, **given: Any) -> torch.Tensor:
        """Run a step of one pipeline stage, in one piece or patch by patch."""
        given = {"stages": 2, **given}
        if not patched:
            return self(x, level, Position(0, PATCHES), **given)
        parts = enumerate(x.split(PATCHES, dim=1))
        made = [self(p, level, Position(i, PATCHES, True), **given) for i, p in parts]
        return torch.cat(made, dim=1)

    @property
    def flags(self) -> list[int]:
        """What was decided in this generation, as bits of spans."""
        return [flags for *_, flags in self.engine.decisions.entries]

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Step, branch and flags of all decisions of this generation."""
        return [entry[1:] for entry in self.engine.decisions.entries]

    @property
    def reasons(self) -> list[str]:
        """Why the first span was skipped or computed, by decision of this generation."""
        return [row["reason"] for row in self.engine.trace() if row["span"] == 0]


class WholeForward:
    """A forward pass that a forecaster stands in for as a whole, run as a transformer's hook does.

    Args:
        config: of the cache.
        channels: of its latents.
        group: place of the process; alone by default.
        fitted: a calibration, or None.
    """

    def __init__(
        self,
        config: CacheConfig,
        channels: int,
        group: DecisionGroup | None = None,
        fitted: Fitted | None = None,
    ):
        parts = {"dim": channels, "fitted": fitted}
        self.engine = engine_of(config, [ForwardContract()], 2, group, **parts)

    def __call__(
        self, forward: Callable[[torch.Tensor], Any], x: torch.Tensor, level: float, **given: Any
    ) -> Any:
        """Run `forward`, or stand in for it."""
        self.engine.open(arrival(level, x, **given))
        output = self.engine.run_block(0, forward, (x,), {})
        self.engine.close()
        return output

    @property
    def flags(self) -> list[int]:
        """What was decided in this generation."""
        return [flags for *_, flags in self.engine.decisions.entries]

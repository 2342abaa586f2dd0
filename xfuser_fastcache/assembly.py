"""From options and a model to the blueprint of a cache, every contradiction refused on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from xfuser_fastcache.artifacts.calibration import (
    CALIBRATION,
    Fitted,
    check_model,
    fingerprint,
    load_fitted,
)
from xfuser_fastcache.artifacts.linear_maps import LINEAR_MAPS, FittedMaps, load_maps
from xfuser_fastcache.artifacts.moved import moved
from xfuser_fastcache.backends import forecaster_of, gate_of, uncovered_of
from xfuser_fastcache.blueprint import Blueprint
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.config.budget import Budget
from xfuser_fastcache.config.methods import budget_of, made
from xfuser_fastcache.config.parts import parts_of
from xfuser_fastcache.consensus.collective import BlockList, Consensus
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.measurements.probes import Probe
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import ForwardContract
from xfuser_fastcache.models.noise import Mixture
from xfuser_fastcache.models.spans import span_of_blocks
from xfuser_fastcache.models.streams import ENCODER
from xfuser_fastcache.models.token_layout import TokenCounts
from xfuser_fastcache.models.wrappers import gathered
from xfuser_fastcache.plugins import ADAPTERS, loaded
from xfuser_fastcache.reports.statistics import BlockInfo
from xfuser_fastcache.state.latents import StageLatents
from xfuser_fastcache.tokens.interface import NoTokenPlan, TokenPlan
from xfuser_fastcache.tokens.plan import token_plan

# The backend whose forecaster is a choice of ours; the others' belong to what was published.
FAST = "Fast"
logger = logging.getLogger("xfuser_fastcache")


@dataclass(frozen=True)
class Request:
    """Options with the files that they name.

    Attributes:
        config: resolved; paths are replaced by the digests of what they hold.
        fitted: the calibration, or None.
        maps: linear maps, or None.
        path: of either, for messages.
        budget: that has chosen the config's mask from the calibration, or None.
    """

    config: CacheConfig
    fitted: Fitted | None = None
    maps: FittedMaps | None = None
    path: str = ""
    budget: Budget | None = None

    @classmethod
    def of(cls, config: CacheConfig, adapter: type[ModelAdapter]) -> Request:
        """Read the files that a config names, and fill what it leaves to the model's family.

        Raises:
            ValueError: a file that does not hold what it should, or options that contradict it.
        """
        config = _for_family(config, adapter.forecaster)
        path = config.calibration or config.linear_maps or ""
        if config.linear_maps:
            maps = load_maps(path)
            config = replace(config, linear_maps=maps.digest)
            return cls(config.resolved(), maps=maps, path=path)
        fitted = load_fitted(path) if path else None
        found = config.resolved(fitted)
        chosen = fitted is not None and found.steps_mask is not None
        return cls(found, fitted, path=path, budget=budget_of(config) if chosen else None)

    @property
    def whole_forward(self) -> bool:
        """Whether the forecaster stands in for the whole forward pass."""
        return self.config.methods.forecaster.whole_forward

    def check(
        self,
        adapter: type[ModelAdapter],
        contracts: dict[str, BlockContract],
        group: DecisionGroup,
    ) -> None:
        """Refuse what the model or the layout cannot do, before any rank is waited for.

        Args:
            adapter: of the model's family.
            contracts: of the first block of each list that this rank holds.
            group: of the ranks that decide together.

        Raises:
            ValueError: it says what.
        """
        gate_of(self.config, self.fitted)
        _check_return_order(self.config, contracts)
        if adapter.long_skips:
            self._check_long_skips(adapter, group)
        if self.maps is not None and group.stages > 1:
            raise ValueError(
                f"linear_maps={self.path!r} is fitted for the whole stack of blocks, of which each "
                f"of the {group.stages} pipeline stages holds a part; leave linear_maps out, or "
                "run with pipefusion_parallel_degree=1"
            )
        if self.fitted is not None and self.fitted.of_stages and group.stages == 1:
            _say_once(
                f"the calibration {self.path!r} was made under {self.fitted.metadata['layout']}: "
                "its masks and corrections are for the older keys there. Without PipeFusion evenly "
                "spaced steps did better: make one in this layout with fastcache calibrate."
            )
        if self.config.shadow_audit and group.stages > 1:
            _say_once(
                "shadow_audit does nothing under PipeFusion, where computing a skipped patch as "
                "well would renew its keys and values: audits stays 0."
            )

    def _check_long_skips(self, adapter: type[ModelAdapter], group: DecisionGroup) -> None:
        name, cut = adapter.model_class, self.config.granularity
        if cut != "stack":
            raise ValueError(
                f"granularity={cut!r} cuts {name}, whose later blocks take what earlier ones put "
                "out: all are skipped together, or none. Leave granularity out, which is 'stack'."
            )
        if group.stages > 1 and self.whole_forward:
            raise ValueError(
                f"under PipeFusion a stage of {name} hands on what its blocks have put out, too, "
                "which no forecast of the whole forward pass makes: give a forecaster of blocks, "
                "forecaster='damped_taylor', or pipefusion_parallel_degree=1"
            )


@runtime_checkable
class SaysFingerprint(Protocol):
    """An adapter for a class that holds checkpoints of another family's class, and their files."""

    def fingerprint(self, model: nn.Module, blocks: int) -> dict[str, str]:
        """Return what `artifacts.calibration.fingerprint` finds in that family's class."""


def _for_family(config: CacheConfig, forecaster: str | None) -> CacheConfig:
    """Return a config with its family's forecaster where `Fast` would bring its own, and nothing
    that was asked for needs what that withholds. A budget's own forecaster is kept: it holds as
    little (docs/video.md has how it compares)."""
    asked = config.forecaster or config.calibration or config.linear_maps or budget_of(config)
    if forecaster is None or asked or config.use_cache != FAST:
        return config
    withheld = made("forecaster", forecaster).withholds
    needed = {need for part in parts_of(config) for need in part.needs}
    return config if needed.intersection(withheld) else replace(config, forecaster=forecaster)


def adapter_of(model: nn.Module) -> type[ModelAdapter]:
    """Return the registered adapter of a diffusers transformer.

    Raises:
        ValueError: no adapter supports it; the message names the nearest of the supported ones.
    """
    known = loaded(ADAPTERS).values()
    for adapter in known:
        if adapter.supports(model):
            return adapter
    name = type(model).__name__
    if "UNet" in name:
        raise ValueError(
            f"{name} is a UNet, which has no stack of transformer blocks to skip. `fastcache "
            "models` and docs/models.md list what the cache runs on; for UNets there is DeepCache "
            "(arXiv 2312.00858)."
        )
    likeness = {adapter.model_class: _likeness(adapter, model) for adapter in known}
    names = sorted(likeness, key=lambda of: (-likeness[of], of))
    nearest = [of for of in names if likeness[of] > _UNLIKE][:3]
    which = (
        f"nearest to it are {', '.join(nearest)}"
        if nearest
        else f"only {', '.join(sorted(names))} are"
    )
    raise ValueError(
        f"{name} is not supported by the cache; {which}, as `fastcache models` says. Pass the "
        "pipeline's transformer (pipe.transformer), or add an adapter for the model (entry point "
        f"group {ADAPTERS!r}): docs/extending.md."
    )


_UNLIKE = 0.6


def _likeness(adapter: type[ModelAdapter], model: nn.Module) -> float:
    """Return how near a family is to a model: by lists of blocks, embedder and name."""
    lists = len(adapter.block_lists)
    alike = sum(hasattr(model, name) for name in adapter.block_lists)
    named = SequenceMatcher(None, type(model).__name__, adapter.model_class).ratio()
    embeds = hasattr(model, adapter.embedder.partition(".")[0])
    return named + (2 * lists + embeds if alike == lists else 0)


def blocks_held(model: nn.Module, adapter: type[ModelAdapter]) -> dict[str, list[nn.Module]]:
    """Return the blocks that this rank holds as they are called, by the list that holds them."""
    return {name: list(getattr(model, name)) for name in adapter.block_lists}


def block_lists_of(held: dict[str, list[nn.Module]]) -> tuple[BlockList, ...]:
    """Return what ranks tell each other of their blocks."""
    return tuple(
        BlockList(len(blocks), parameters_of(blocks[0]) if blocks else 0)
        for blocks in held.values()
    )


def drawn(
    request: Request,
    transformer: nn.Module,
    model: nn.Module,
    adapter: type[ModelAdapter],
    consensus: Consensus,
    counts: TokenCounts,
    scheduler: Callable[[], Any],
) -> Blueprint:
    """Return the blueprint of a cache on a model.

    Args:
        request: that was checked.
        transformer: that the pipeline calls.
        model: in it: the diffusers model, or a pipeline stage's part of one.
        adapter: of its family.
        consensus: knows what the other stages hold.
        counts: how many tokens of a forward pass are the image's.
        scheduler: returns the one that plans the steps now, or None.

    Raises:
        ValueError: a file that was made for another model.
    """
    config, group = request.config, consensus.group
    held = blocks_held(model, adapter)
    blocks = [block for listed in held.values() for block in listed]
    of_blocks = adapter.contracts(model, counts)
    gate = gate_of(config, request.fitted, adapter.tea_polynomial_of(model))
    apart = Probe.FIRST_RESIDUAL in gate.probes
    infos = _block_infos(tuple(held), consensus, config.granularity, apart)
    with gathered(transformer):
        _check_files(request, model, adapter, len(infos))
    contracts: list[BlockContract | ForwardContract] = list(of_blocks)
    dim = adapter.dim(model)
    tokens: TokenPlan = NoTokenPlan()
    latents = None
    if request.whole_forward:
        # What a later stage is given are no latents, of which some channels are noise.
        later = ForwardContract(adapter.forward_layout(), counts=counts)
        contracts = [later if group.stage else adapter.forward_contract(model, counts)]
        dim = adapter.noise_channels(model)
        if group.stage and group.is_last_stage:
            latents = StageLatents(adapter.forward_layout().tokens, scheduler)
    else:
        tokens = _token_plan(request, adapter, group, blocks, of_blocks)
    first = sum(part.blocks for stage in consensus.stages[: group.stage] for part in stage)
    maps = None
    if request.maps is not None and not config.methods.plan_takes_maps:
        maps = request.maps.of[config.methods.forecaster.takes_maps]

    def modulated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        with gathered(blocks[0]):
            return adapter.tea_input(of_blocks[0], blocks[0], args, kwargs)

    def mixture(level: float) -> Mixture:
        found = getattr(scheduler(), "config", {})
        return adapter.noise.mixture(level, found.get("prediction_type", ""))

    def uncovered(levels: Sequence[float] | None) -> tuple[Forecaster, list[int] | None]:
        fitted, budget = request.fitted, request.budget
        if fitted is not None and budget is not None and levels:
            found = moved(fitted, budget.of(len(levels)), levels)
            if found is not None:
                (mask,) = found.masks.values()
                return forecaster_of(replace(config, steps_mask=mask), found, group), mask
        return uncovered_of(group, mixture), None

    return Blueprint(
        config=config,
        gate=gate,
        forecaster=forecaster_of(config, request.fitted, group, maps, mixture),
        uncovered=None if request.fitted is None else uncovered,
        budget=request.budget,
        blocks=infos,
        contracts=contracts,
        first_block=first,
        dim=dim,
        fitted=request.fitted,
        modulated=modulated if first == 0 else None,
        tokens=tokens,
        latents=latents,
    )


def _check_files(
    request: Request, model: nn.Module, adapter: type[ModelAdapter], blocks: int
) -> None:
    """Refuse a file that was made for another model; without one no weights are read."""
    for held, kind in ((request.fitted, CALIBRATION), (request.maps, LINEAR_MAPS)):
        if held is not None:
            if isinstance(adapter, SaysFingerprint):
                found = adapter.fingerprint(model, blocks)
            else:
                found = fingerprint(model, adapter.model_class, adapter.embedder, blocks)
            check_model(held.metadata, request.path, kind, found)


@cache
def _say_once(message: str) -> None:
    logger.warning("%s (Said once.)", message)


def _token_plan(
    request: Request,
    adapter: type[ModelAdapter],
    group: DecisionGroup,
    blocks: list[nn.Module],
    contracts: list[BlockContract],
) -> TokenPlan:
    """Return the token plan that a config asks for, where there can be one."""
    methods = request.config.methods.token_plans
    if methods and group.stages > 1:
        _say_once(
            "Token plans do nothing under PipeFusion, whose stages run patches: blocks are skipped "
            "without them, and spatial_approx_ratio stays 0."
        )
        methods = ()
    if methods and not adapter.narrows:
        _say_once(
            f"Token plans do nothing on {adapter.model_class}, whose blocks need all tokens: they "
            "are skipped without them, and spatial_approx_ratio stays 0."
        )
        methods = ()
    attention_costs = [
        _attention_cost(block, contract) for block, contract in zip(blocks, contracts, strict=True)
    ]
    # They keep the last residual, which is what these maps correct.
    static = None if request.maps is None else request.maps.of["linear"]
    return token_plan(methods, contracts, attention_costs, static)


def _check_return_order(config: CacheConfig, contracts: dict[str, BlockContract]) -> None:
    given = config.return_hidden_states_first
    for name, contract in contracts.items():
        actual = contract.returns[0] != ENCODER
        if given is not None and given != actual:
            raise ValueError(
                f"return_hidden_states_first={given} does not fit {name}, which returns "
                f"{' then '.join(contract.returns)}; leave it out, the adapter knows the order"
            )


def parameters_of(block: nn.Module) -> int:
    """Return the number of a block's parameters, of the whole where FSDP has cut them."""
    with gathered(block):
        return _numel(block)


def _attention_cost(block: nn.Module, contract: BlockContract) -> float:
    with gathered(block):
        return sum(map(_numel, contract.attention_of(block).values())) / _numel(block)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _block_infos(
    names: tuple[str, ...], consensus: Consensus, granularity: int | str, first_apart: bool
) -> list[BlockInfo]:
    """Return all blocks of the whole model in order, from what the stages hold of each list."""
    found = []
    for index, name in enumerate(names):
        count = sum(stage[index].blocks for stage in consensus.stages)
        cost = max(stage[index].cost for stage in consensus.stages)
        found += [(f"{name}.{i}", cost) for i in range(count)]
    total = sum(cost for _, cost in found)
    spans = span_of_blocks(len(found), granularity, first_apart)
    return [
        BlockInfo(name, span, cost / total) for (name, cost), span in zip(found, spans, strict=True)
    ]

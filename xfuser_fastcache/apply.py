"""Put a cache on a transformer, take it off, ask what it did."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from torch import nn

from xfuser_fastcache.artifacts.calibration import (
    CALIBRATION,
    check_model,
    fingerprint,
    load_fitted,
    settled,
)
from xfuser_fastcache.artifacts.linear_maps import LINEAR_MAPS, FittedMaps, load_maps
from xfuser_fastcache.backends import FORECASTERS, forecaster_of, gate_of
from xfuser_fastcache.clock.timeline import Schedule
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.consensus.collective import BlockList, Consensus
from xfuser_fastcache.consensus.topology import DecisionGroup, PlainLayout
from xfuser_fastcache.engine import CacheEngine
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.hooks import Attachment, TransformerHook, hook_on, refuse_compiled
from xfuser_fastcache.measurements.probes import Probe
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import ForwardContract
from xfuser_fastcache.models.spans import span_of_blocks
from xfuser_fastcache.models.streams import ENCODER
from xfuser_fastcache.plugins import ADAPTERS, LAYOUTS, loaded
from xfuser_fastcache.reports.statistics import BlockInfo
from xfuser_fastcache.tokens.plan import TokenPlan, token_plan

logger = logging.getLogger("xfuser_fastcache")


def apply_cache_on_transformer(
    transformer: nn.Module,
    *,
    config: CacheConfig | None = None,
    scheduler: Any = None,
    process_group: Any = None,
    **options: Any,
) -> nn.Module:
    """Put a step cache on a transformer, in place.

    Under torch.distributed it is a collective call: every rank of the decision group makes it,
    with the same options. Apply it after xfuser has wrapped the pipeline. `sync_timeout_s` also
    becomes the limit of xfuser's own waits, and stays it when the cache is removed.

    The cache serves one generation at a time. Threads that draw at the same time need a transformer
    each: where two share one, the generation that began last keeps it, and the other thread gets
    an error at its next step.

    With guidance in several calls a step, each call is a branch with a state of its own. Branches
    that are left out at some steps are best called under diffusers' `transformer.cache_context`;
    calls without a name go by their order within the step.

    Args:
        transformer: a supported diffusers transformer, or xfuser's wrapper around one.
        config: all options at once; or give them one by one.
        scheduler: the pipeline's. With it generations, their number of steps and the exact noise
            levels are known; without it, a generation starts where the noise level rises.
        process_group: ranks that run this forward together, for plain torch.distributed; default
            all ranks. Under xfuser the group follows from its parallel configuration.
        **options: fields of `CacheConfig`, among them `use_cache="Fast"` and
            `cache_ratio_threshold`; xDiT's `rel_l1_thresh` is taken for the latter.

    Returns:
        The same transformer.

    Raises:
        ValueError: an unsupported model, one that is cached already or compiled as a whole, a wrong
            option.
        TypeError: an option of the wrong type.
        NotImplementedError: an option that is not built yet.
        ConsensusError: ranks were given different options or models, or one did not come.

    Example:
        >>> from diffusers import FluxTransformer2DModel
        >>> model = FluxTransformer2DModel(
        ...     in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        ...     num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        ...     axes_dims_rope=(4, 4, 8))
        >>> model = apply_cache_on_transformer(model, use_cache="Fast", cache_ratio_threshold=0.1)
        >>> get_cache_statistics(model)["steps"]
        0
        >>> model = remove_cache(model)
    """
    if config is None:
        config = CacheConfig.from_dict(options)
    elif options:
        raise ValueError(f"give either config or single options, not both: {', '.join(options)}")
    if hook_on(transformer) is not None:
        raise ValueError(
            f"this {type(transformer).__name__} is cached already; call remove_cache(transformer) "
            "first"
        )
    path, fitted, maps = config.calibration or config.linear_maps or "", None, None
    if config.linear_maps:
        maps = load_maps(path)
        config = replace(config, linear_maps=maps.digest)
    elif path:
        if scheduler is None:
            raise ValueError(
                f"calibration={path!r} needs the pipeline's scheduler, whose steps it was made "
                "for; pass scheduler=pipe.scheduler"
            )
        fitted = load_fitted(path)
        config = settled(config, fitted)
    apart = Probe.FIRST_RESIDUAL in gate_of(config, fitted).probes
    if isinstance(transformer, nn.Module):
        refuse_compiled(transformer, FORECASTERS[config.forecaster].whole_forward)
    layout = _layout(transformer, process_group)
    model = layout.model_of(transformer)
    adapter = adapter_of(model)
    _check_return_order(config, adapter)
    held = {name: list(getattr(model, name)) for name in adapter.block_lists}
    group = layout.decision_group()
    if maps is not None and group.stages > 1:
        raise ValueError(
            f"linear_maps={path!r} is fitted for the whole stack of blocks, of which each of the "
            f"{group.stages} pipeline stages holds a part; leave linear_maps out, or run with "
            "pipefusion_parallel_degree=1"
        )
    if config.shadow_audit and group.stages > 1:
        _say_inert(
            "shadow_audit does nothing under PipeFusion, where computing a skipped patch as well "
            "would renew its keys and values: audits stays 0."
        )
    layout.limit_waits(config.sync_timeout_s)
    consensus = Consensus(
        group,
        backend=config.sync_backend,
        timeout_s=config.sync_timeout_s,
        config_digest=config.digest(),
        block_lists=tuple(
            BlockList(len(blocks), _parameters(blocks[0]) if blocks else 0)
            for blocks in held.values()
        ),
    )
    blocks = [block for listed in held.values() for block in listed]
    infos = _block_infos(tuple(held), consensus.stages, config.granularity, apart)
    made = fitted or maps
    if made is not None:
        kind = CALIBRATION if made is fitted else LINEAR_MAPS
        found = fingerprint(model, adapter.model_class, adapter.embedder, len(infos))
        try:
            check_model(made.metadata, path, kind, found)
        except ValueError:
            consensus.close()
            raise
    contracts: list[BlockContract | ForwardContract]
    tokens = None
    if forecaster_of(config, fitted, group).whole_forward:
        contracts, dim = [ForwardContract()], adapter.latent_channels(model)
    else:
        of_blocks = [adapter.block_lists[name] for name, listed in held.items() for _ in listed]
        contracts, dim = list(of_blocks), adapter.dim(model)
        tokens = _token_plan(config, group, blocks, of_blocks, maps)
    first_block = sum(part.blocks for stage in consensus.stages[: group.stage] for part in stage)
    engine = CacheEngine(
        config,
        consensus,
        infos,
        contracts,
        first_block,
        dim,
        fitted,
        modulated=partial(adapter.modulated_input, blocks[0]) if first_block == 0 else None,
        polynomial=adapter.tea_polynomial,
        tokens=tokens,
        maps=None if maps is None or config.splits_tokens else maps.of[config.forecaster],
    )
    embedder = model.get_submodule(adapter.embedder)
    attachment = Attachment(transformer, model, blocks, embedder)
    attachment.attach(engine, _step_opener(engine, adapter, layout, attachment, scheduler))
    return transformer


@cache
def _say_inert(message: str) -> None:
    logger.warning("%s (Said once.)", message)


def _token_plan(
    config: CacheConfig,
    group: DecisionGroup,
    blocks: list[nn.Module],
    contracts: list[BlockContract],
    maps: FittedMaps | None,
) -> TokenPlan | None:
    """Return the token plan that a config asks for; None where there is none, or none can be."""
    attention_costs = [
        sum(map(_parameters, contract.attention_of(block).values())) / _parameters(block)
        for block, contract in zip(blocks, contracts, strict=True)
    ]
    # They keep the last residual, which is what these maps correct.
    static = None if maps is None else maps.of["linear"]
    plan = token_plan(config, contracts, attention_costs, static)
    if plan is not None and group.stages > 1:
        _say_inert(
            "Token plans do nothing under PipeFusion, whose stages run patches: blocks are skipped "
            "without them, and spatial_approx_ratio stays 0."
        )
        return None
    return plan


def remove_cache(transformer: nn.Module) -> nn.Module:
    """Take the cache off and restore the transformer exactly; collective with `verify_consensus`.

    Raises:
        ValueError: there is no cache on it.
        ConsensusError: with `verify_consensus`, ranks decided differently in the last generation.
    """
    hook = _hook(transformer)
    hook.attachment.detach()
    hook.engine.shut_down()
    return transformer


def get_cache_statistics(transformer: nn.Module) -> dict[str, Any]:
    """Return what the cache did since it was applied or its counters were reset.

    Ratios are between 0 and 1, times in seconds, sizes in bytes. `collectives` counts the rounds of
    consensus; a single process takes them without a wire.

    Raises:
        ValueError: there is no cache on it.
    """
    return _hook(transformer).engine.statistics()


def get_cache_trace(transformer: nn.Module) -> list[dict[str, Any]]:
    """Return what was decided in the last generation, and why: an entry a step, branch and span.

    Keys: `generation, step, branch, noise_level, span, first_block, last_block`; `decision`:
    "skipped", "computed" where the gate refused, or "forced" where it was not asked; `reason`;
    `statistic` (what the gate weighed: `Fast` the squared relative change, others as their
    docstrings say) and the `threshold` that it has to stay below, both None where the gate was not
    asked (the statistic also where there is nothing to compare with);
    `consensus_wait_s`, seconds that this rank waited at the step. All but the last are equal on all
    ranks of a decision group.

    Raises:
        ValueError: there is no cache on it.
    """
    return _hook(transformer).engine.trace()


def reset_cache_statistics(transformer: nn.Module) -> None:
    """Start the counters anew; anchors, decisions and their digest go on.

    Raises:
        ValueError: there is no cache on it.
    """
    _hook(transformer).engine.reset_statistics()


def replace_forecaster(transformer: nn.Module, forecaster: Forecaster) -> None:
    """Let another forecaster stand in, of the same reach; calibrations fit theirs as they run.

    Raises:
        ValueError: there is no cache on it.
    """
    _hook(transformer).engine.forecaster = forecaster


def _hook(transformer: nn.Module) -> TransformerHook:
    hook = hook_on(transformer)
    if hook is None:
        raise ValueError(
            f"there is no cache on this {type(transformer).__name__}; call "
            "apply_cache_on_transformer(transformer, use_cache='Fast') first, with the transformer "
            "that the pipeline calls"
        )
    return hook


def _layout(transformer: nn.Module, process_group: Any) -> Any:
    if process_group is None:
        for layout in loaded(LAYOUTS).values():
            if layout.recognises(transformer):
                return layout()
    return PlainLayout(process_group)


def adapter_of(model: nn.Module) -> type[ModelAdapter]:
    """Return the registered adapter of a diffusers transformer.

    Raises:
        ValueError: no adapter supports it; the message lists the supported ones.
    """
    known = loaded(ADAPTERS)
    for adapter in known.values():
        if adapter.supports(model):
            return adapter
    names = sorted(adapter.model_class for adapter in known.values())
    raise ValueError(
        f"{type(model).__name__} is not supported by the cache; supported: {', '.join(names)}. "
        "Pass the pipeline's transformer (pipe.transformer), or register an adapter for the model "
        f"(entry point group {ADAPTERS!r})."
    )


def _check_return_order(config: CacheConfig, adapter: type[ModelAdapter]) -> None:
    given = config.return_hidden_states_first
    for name, contract in adapter.block_lists.items():
        actual = contract.returns[0] != ENCODER
        if given is not None and given != actual:
            raise ValueError(
                f"return_hidden_states_first={given} does not fit {name}, which returns "
                f"{' then '.join(contract.returns)}; leave it out, the adapter knows the order"
            )


def _parameters(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def _block_infos(
    names: tuple[str, ...],
    stages: list[list[BlockList]],
    granularity: int | str,
    first_apart: bool,
) -> list[BlockInfo]:
    """Return all blocks of the whole model in order, from what the stages hold of each list."""
    found = []
    for index, name in enumerate(names):
        count = sum(stage[index].blocks for stage in stages)
        cost = max(stage[index].cost for stage in stages)
        found += [(f"{name}.{i}", cost) for i in range(count)]
    total = sum(cost for _, cost in found)
    spans = span_of_blocks(len(found), granularity, first_apart)
    return [
        BlockInfo(name, span, cost / total) for (name, cost), span in zip(found, spans, strict=True)
    ]


def _step_opener(
    engine: CacheEngine,
    adapter: type[ModelAdapter],
    layout: Any,
    attachment: Attachment,
    scheduler: Any,
) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
    """Return what opens a step of `engine` from the arguments of the transformer's forward."""
    schedule: Schedule | None = None

    def open_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal schedule
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None:
            schedule = None
        elif schedule is None or schedule.timesteps is not timesteps:
            schedule = Schedule(timesteps, tuple(adapter.plan(scheduler)))
        hidden_states = args[0] if args else kwargs["hidden_states"]
        position = layout.position()
        tokens = sum(position.patch_tokens) or tuple(hidden_states.shape[1:])
        timestep = float(adapter.timestep(args, kwargs).flatten()[0])
        engine.open(
            timestep,
            adapter.noise_level(timestep),
            (hidden_states.shape[0], tokens, hidden_states.dtype, hidden_states.device),
            position,
            hidden_states.device,
            schedule,
            attachment.branch_name.name,
        )

    return open_step

"""Put a cache on a transformer or a whole pipeline, take it off, ask what it did."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from xfuser_fastcache.assembly import (
    Request,
    adapter_of,
    block_lists_of,
    blocks_held,
    drawn,
)
from xfuser_fastcache.clock.clock import Clock, Reader
from xfuser_fastcache.clock.pipelines import PresentScheduler, owners_of, watch_pipelines
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.consensus.collective import Consensus
from xfuser_fastcache.consensus.topology import Layout, PlainLayout
from xfuser_fastcache.engine import CacheEngine
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.hooks import Attachment, TransformerHook, hook_on, refuse_compiled
from xfuser_fastcache.models.token_layout import TokenCounts
from xfuser_fastcache.plugins import ADAPTERS, LAYOUTS, loaded

__all__ = [
    "adapter_of",
    "apply_cache_on_pipeline",
    "apply_cache_on_transformer",
    "denoisers_of",
    "get_cache_statistics",
    "get_cache_trace",
    "remove_cache",
    "remove_cache_from_pipeline",
    "reset_cache_statistics",
]


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
    becomes the limit of xfuser's own waits, and stays it when the cache is removed. After a
    generation that failed on one rank, every rank removes the cache and applies it again.

    Steps are told by the counter of the scheduler that has planned them: that of the pipeline which
    holds the transformer, also where it is exchanged later, or the one given. Where a pipeline has
    several denoisers (Wan 2.2), their caches go by one clock.

    The cache serves one generation at a time. Threads that draw at the same time need a transformer
    each: where two share one, the generation that began last keeps it, and the other thread gets
    an error at its next step.

    With guidance in several calls a step, each call is a branch with a state of its own. Branches
    that are left out at some steps are best called under diffusers' `transformer.cache_context`;
    calls without a name go by their order within the step. A branch whose batch or size changes
    goes on as a new one: what cannot be forecast is computed.

    Args:
        transformer: a supported diffusers transformer, or xfuser's wrapper around one.
        config: all options at once; or give them one by one.
        scheduler: plans the steps where the transformer is called outside of its pipeline. Without
            any scheduler steps are told apart by the values of timesteps, with a warning.
        process_group: ranks that run this forward together, for plain torch.distributed; default
            all ranks. Replicas that draw pictures of their own need a group each. Under xfuser the
            group follows from its parallel configuration.
        **options: fields of `CacheConfig`, among them `use_cache="Fast"` and
            `cache_ratio_threshold`; xDiT's `rel_l1_thresh` is taken for the latter.

    Returns:
        The same transformer.

    Raises:
        ValueError: an unsupported model, one that is cached already or compiled as a whole, a wrong
            option.
        TypeError: an option of the wrong type.
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
    watch_pipelines()
    if config.calibration and scheduler is None and not owners_of(transformer):
        raise ValueError(
            f"calibration={config.calibration!r} needs the scheduler whose steps it was made for, "
            "and no pipeline holds this transformer; pass scheduler=pipe.scheduler"
        )
    layout = _layout(transformer, process_group)
    model = layout.model_of(transformer)
    adapter = adapter_of(model)
    request = Request.of(config, adapter)
    group = layout.decision_group(transformer, request.whole_forward)
    # A pipeline's stages run patches; where a condition's tokens are in them is not known.
    which = adapter.latent_tokens if request.whole_forward else adapter.image_tokens
    count = functools.partial(which, model) if group.stages == 1 else None
    counts = TokenCounts(count, group.shard, group.shards)
    held = blocks_held(model, adapter)
    blocks = [block for listed in held.values() for block in listed]
    refuse_compiled(transformer, blocks, request.whole_forward)
    kinds = {name: adapter.block_lists[name].of(held[name][0]) for name in held if held[name]}
    request.check(adapter, kinds, group)
    config = request.config
    consensus = Consensus(
        group,
        backend=config.sync_backend,
        timeout_s=config.sync_timeout_s,
        config_digest=config.digest(),
        block_lists=block_lists_of(held),
    )
    try:
        layout.follow(consensus)
        pulse = PresentScheduler(transformer, scheduler)
        plan = drawn(request, transformer, model, adapter, consensus, counts, pulse)
        plan = replace(plan, keys=layout.patch_keys(config.patch_kv_slope))
        engine = CacheEngine(plan, consensus, _clock(transformer, config))
        reader = Reader(adapter, counts, pulse, layout, group.stages, engine.denoiser)
        attachment = Attachment(transformer, model, blocks, model.get_submodule(adapter.embedder))
        attachment.attach(engine, reader)
    except BaseException:
        consensus.close()
        raise
    return transformer


def apply_cache_on_pipeline(
    pipe: Any, *, config: CacheConfig | None = None, process_group: Any = None, **options: Any
) -> Any:
    """Put a step cache on every denoiser of a pipeline, in place; a collective call.

    Args:
        pipe: a diffusers pipeline, or xfuser's class around one.
        config: as of `apply_cache_on_transformer`, and so are the others.
        process_group: likewise.
        **options: likewise.

    Returns:
        The same pipeline.

    Raises:
        TypeError: a pipeline without a transformer that is supported, or an option of the wrong
            type.
        ValueError, ConsensusError: as `apply_cache_on_transformer`; then no denoiser is cached.
    """
    if config is None:
        config = CacheConfig.from_dict(options)
    elif options:
        raise ValueError(f"give either config or single options, not both: {', '.join(options)}")
    cached: list[nn.Module] = []
    try:
        for denoiser in denoisers_of(pipe).values():
            apply_cache_on_transformer(
                denoiser, config=config, scheduler=pipe.scheduler, process_group=process_group
            )
            cached.append(denoiser)
    except BaseException:
        for denoiser in cached:
            remove_cache(denoiser)
        raise
    return pipe


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return a pipeline's transformers that a cache can be put on, by their names in it.

    Raises:
        TypeError: there is none.
        ValueError: its transformer is of a family that no adapter supports.
    """
    inner = getattr(pipe, "module", pipe)  # xfuser's class around a pipeline
    held = {
        name: part
        for name, part in getattr(inner, "__dict__", {}).items()
        if isinstance(part, nn.Module)
    }
    known = loaded(ADAPTERS).values()
    found = {
        name: part
        for name, part in held.items()
        if any(adapter.supports(_layout(part, None).model_of(part)) for adapter in known)
    }
    if not found:
        for part in filter(None, map(held.get, ("transformer", "unet"))):
            adapter_of(_layout(part, None).model_of(part))
        has = ", ".join(f"{name} ({type(part).__name__})" for name, part in held.items())
        raise TypeError(
            f"{type(pipe).__name__} has no transformer to cache; give a pipeline of diffusers or "
            f"xfuser that has one, such as FluxPipeline. It holds: {has or 'no module'}"
        )
    return found


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


def remove_cache_from_pipeline(pipe: Any) -> Any:
    """Take the cache off every denoiser of a pipeline that has one; returns the pipeline.

    Raises:
        TypeError: a pipeline without a transformer that is supported.
        ConsensusError: as `remove_cache`.
    """
    with ExitStack() as each:  # goes on to the next whatever one raises
        for denoiser in denoisers_of(pipe).values():
            if hook_on(denoiser) is not None:
                each.callback(remove_cache, denoiser)
    return pipe


def get_cache_statistics(transformer: nn.Module) -> dict[str, Any]:
    """Return what the cache did since it was applied or its counters were reset.

    Ratios are between 0 and 1, times in seconds, sizes in bytes. `collectives` counts the rounds of
    consensus; a single process takes them without a wire. `clock` is what the last call was placed
    by: the scheduler's counter, `cache_context`, the plan, or values of timesteps. `recomputed`
    counts forward passes that ran again, since a forecast had found no place in them.

    Raises:
        ValueError: there is no cache on it.
    """
    return _hook(transformer).engine.statistics()


def get_cache_trace(transformer: nn.Module) -> list[dict[str, Any]]:
    """Return what was decided in the last generation, and why: an entry a step, branch and span.

    Keys: `generation, step, branch, noise_level, span, first_block, last_block`; `decision`:
    "skipped", "computed" where the gate refused, "scheduled" where a mask or budget says so, or
    "forced" where nobody was asked; `reason`;
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


def model_of(transformer: nn.Module) -> nn.Module:
    """Return the diffusers model inside what a pipeline calls."""
    return _layout(transformer, None).model_of(transformer)


def _hook(transformer: nn.Module) -> TransformerHook:
    hook = hook_on(transformer)
    if hook is None:
        raise ValueError(
            f"there is no cache on this {type(transformer).__name__}; call "
            "apply_cache_on_transformer(transformer, use_cache='Fast') first, with the transformer "
            "that the pipeline calls"
        )
    return hook


def _layout(transformer: nn.Module, process_group: Any) -> Layout:
    if process_group is None:
        for layout in loaded(LAYOUTS).values():
            if layout.recognises(transformer):
                made: Layout = layout()
                return made
    return PlainLayout(process_group)


def _clock(transformer: nn.Module, config: CacheConfig) -> Clock:
    """Return the clock of the pipeline that holds a transformer: that of another cached denoiser of
    it, or a new one."""
    for pipe in owners_of(transformer):
        for part in vars(pipe).values():
            hook = hook_on(part) if isinstance(part, nn.Module) else None
            if hook is not None and part is not transformer:
                return hook.engine.clock
    return Clock(config.num_steps)

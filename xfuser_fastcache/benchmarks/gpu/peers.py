"""Other projects' caches on the same model, through their own public calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from xfuser_fastcache.benchmarks.gpu.record import Figures, LeftOut
from xfuser_fastcache.benchmarks.gpu.subject import Subject, computed_mask

# Of the steps, as in the middle of our own masks.
SKIPPED = 0.64
Prepare = Callable[[Subject, torch.Tensor], Any]


@contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """Give every module back the attributes and children that it had."""
    kept = [(m, dict(m.__dict__), dict(m._modules)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, children in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()
            module._modules.update(children)


@contextmanager
def _attention_calls() -> Iterator[list[int]]:
    """Count calls of torch's attention, which every cache here skips with the blocks."""
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention
    count = [0]

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        count[0] += 1
        return original(*args, **kwargs)

    functional.scaled_dot_product_attention = counted
    try:
        yield count
    finally:
        functional.scaled_dot_product_attention = original


def residual_changes(subject: Subject) -> torch.Tensor:
    """Return how much the first block's residual changes between any two steps of a generation.

    Returns:
        `(steps, steps)`, float32 on the host: mean |r_j - r_i| over mean |r_i|, for i before j.
    """
    residuals: list[torch.Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        # Blocks of two streams return the text first.
        left = output[1] if isinstance(output, tuple) else output
        residuals.append(left - entered)

    handle = subject.model.transformer_blocks[0].register_forward_hook(note, with_kwargs=True)
    try:
        subject.denoise()
    finally:
        handle.remove()
    changes = torch.zeros(len(residuals), len(residuals))
    for i, old in enumerate(residuals):
        scale = old.abs().mean()
        row = [(new - old).abs().mean() / scale for new in residuals[i + 1 :]]
        if row:
            changes[i, i + 1 :] = torch.stack(row).float().cpu()
    return changes


def threshold_for(changes: torch.Tensor, computed: int) -> float:
    """Return the threshold of the first block's change at which about so many steps are computed.

    Example:
        >>> threshold_for(torch.tensor([[0.0, 0.1, 0.4], [0.0, 0.0, 0.3], [0.0, 0.0, 0.0]]), 2)
        0.10000000149011612
    """
    table = changes.tolist()

    def steps_at(threshold: float) -> int:
        last, count = 0, 1
        for step in range(1, len(table)):
            if table[last][step] > threshold:
                last, count = step, count + 1
        return count

    candidates = sorted(table[i][j] for i in range(len(table)) for j in range(i + 1, len(table)))
    return min(candidates, key=lambda threshold: abs(steps_at(threshold) - computed))


def _put_on(subject: Subject, apply: Callable[..., None], config: Any) -> None:
    """Put a cache of diffusers on, as `enable_cache` and `cache_context` do.

    SD3's and PixArt's models do not have these two.
    """
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    apply(subject.model, config)
    HookRegistry.check_if_exists_or_initialize(subject.model).invalidate_child_registries_cache()
    _set_cache_context(subject.model, CacheContext("cond"))


def _first_block(subject: Subject, changes: torch.Tensor) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    computed = sum(computed_mask(subject.steps, SKIPPED))
    config = FirstBlockCacheConfig(threshold=threshold_for(changes, computed))
    _put_on(subject, apply_first_block_cache, config)


def _taylorseer(lite: bool) -> Prepare:
    def prepare(subject: Subject, changes: torch.Tensor) -> None:
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        config = TaylorSeerCacheConfig(
            cache_interval=3,
            disable_cache_before_step=2,
            max_order=1,
            use_lite_mode=lite,
        )
        _put_on(subject, apply_taylorseer_cache, config)

    return prepare


def _cache_dit(taylorseer: bool) -> Prepare:
    def prepare(subject: Subject, changes: torch.Tensor) -> None:
        try:
            import cache_dit
        except ImportError as error:
            raise LeftOut(f"cache-dit is not installed: {error}") from error
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            # The mask alone decides.
            residual_diff_threshold=1e9,
            max_warmup_steps=1,
            num_inference_steps=subject.steps,
            steps_computation_mask=computed_mask(subject.steps, SKIPPED),
        )
        forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylorseer else None
        target = subject.model
        if subject.family.model_class == "SD3Transformer2DModel":
            # It knows this model by its pipeline alone; these are the arguments that it then takes.
            target = cache_dit.BlockAdapter(
                transformer=target,
                blocks=target.transformer_blocks,
                forward_pattern=cache_dit.ForwardPattern.Pattern_1,
            )
        cache_dit.enable_cache(target, cache_config=config, calibrator_config=forecast)

    return prepare


PEERS: dict[str, Prepare] = {
    "cache-dit DBCache, mask": _cache_dit(False),
    "cache-dit DBCache + TaylorSeer, mask": _cache_dit(True),
    "diffusers FirstBlockCache": _first_block,
    "diffusers TaylorSeer lite, interval 3": _taylorseer(True),
    "diffusers TaylorSeer, interval 3": _taylorseer(False),
}
# The one that skips the same steps.
PEERS_LONG = ("cache-dit DBCache, mask",)


def peer(subject: Subject, name: str, changes: torch.Tensor, repeat: int) -> Figures:
    """Time one of `PEERS` in turn with the uncached model.

    Args:
        subject: is cached.
        name: of the peer.
        changes: of `residual_changes`.
        repeat: pairs of generations.
    """
    ratios, times, plain, shares = [], [], [], []
    with torch.no_grad():
        for _ in range(repeat):
            with _attention_calls() as all_calls:
                uncached_ms, _ = subject.timed()
            with restored(subject.model), _attention_calls() as calls:
                PEERS[name](subject, changes)
                ms, latents = subject.timed()
            times.append(ms)
            plain.append(uncached_ms)
            ratios.append(uncached_ms / ms)
            shares.append(1 - calls[0] / all_calls[0])
    share = median(shares)
    return {
        "ms_a_step": median(times),
        "speedup": median(ratios),
        "speedup_of_each_run": ratios,
        "share_skipped": share,
        # None where it skipped no attention: whatever it saves then is not seen here.
        "ideal_speedup": 1 / (1 - share) if 0 < share < 1 else None,
        "share_of_ideal": median(ratios) * (1 - share) if 0 < share < 1 else None,
        "share_of_ideal_fastest": min(plain) / min(times) * (1 - share) if 0 < share < 1 else None,
        "finite": bool(latents.isfinite().all()),
    }

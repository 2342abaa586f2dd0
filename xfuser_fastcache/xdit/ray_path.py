"""The cache under xDiT's Ray path, where the pipelines live in actors and not in this process.

    from xfuser.ray.pipeline.pipeline_utils import RayDiffusionPipeline

    pipe = RayDiffusionPipeline.from_pretrained(xFuserFluxPipeline, model, engine_config)
    apply_cache_on_workers(pipe, use_cache="Fast", cache_ratio_threshold=0.05)
    images = pipe(prompt="a photo of an astronaut riding a horse")
    print(get_worker_statistics(pipe)[0]["block_approx_ratio"])
    remove_cache_from_workers(pipe)

Ray is not among the requirements of this package: `pip install "xfuser-fastcache[ray]"`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xfuser_fastcache.apply import (
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.config.cache_config import CacheConfig


def apply_cache_on_workers(ray_pipeline: Any, **options: Any) -> None:
    """Put a cache on the transformer of every worker.

    Args:
        ray_pipeline: xDiT's `RayDiffusionPipeline`, loaded.
        **options: fields of `CacheConfig`.

    Raises:
        ValueError: wrong options, found here before a worker is asked.
        ray.exceptions.RayTaskError: what a worker raised.
    """
    config = CacheConfig.from_dict(options)

    def apply(actor: Any) -> None:
        pipe = actor.worker.pipe
        apply_cache_on_transformer(pipe.transformer, config=config, scheduler=pipe.scheduler)

    _on_workers(ray_pipeline, apply)


def get_worker_statistics(ray_pipeline: Any) -> list[dict[str, Any]]:
    """Return what `get_cache_statistics` says on each worker, in the order of ranks."""
    return _on_workers(
        ray_pipeline, lambda actor: get_cache_statistics(actor.worker.pipe.transformer)
    )


def remove_cache_from_workers(ray_pipeline: Any) -> None:
    """Take the cache off on every worker."""

    def remove(actor: Any) -> None:
        remove_cache(actor.worker.pipe.transformer)

    _on_workers(ray_pipeline, remove)


def _on_workers(ray_pipeline: Any, function: Callable[[Any], Any]) -> list[Any]:
    """Run a function in each actor, all at once: some of them are collective."""
    import ray

    return ray.get([worker.__ray_call__.remote(function) for worker in ray_pipeline.workers])

"""A cache on a whole pipeline: FastCache's wrapper, and what it shares with xfuser's pipelines."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from xfuser_fastcache.apply import (
    apply_cache_on_pipeline,
    denoisers_of,
    get_cache_statistics,
    remove_cache,
    reset_cache_statistics,
)
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.hooks import hook_on


def put_on(pipe: Any, config: CacheConfig) -> None:
    """Put a cache on a pipeline's denoisers; a collective call.

    xfuser's warm-up run (`prepare_run`) is then made without the cache: its three steps would be
    counted, and masks and calibrations hold for another number of steps.

    Args:
        pipe: a diffusers pipeline, or xfuser's class around one.
        config: the cache's options.

    Raises:
        TypeError, ValueError, ConsensusError: as `apply_cache_on_pipeline`.
    """
    apply_cache_on_pipeline(pipe, config=config)
    if hasattr(type(pipe), "prepare_run"):
        pipe.prepare_run = functools.partial(_prepare_run, weakref.ref(pipe), config)


def take_off(pipe: Any) -> None:
    """Take the cache off a pipeline's denoisers, where there is one."""
    vars(pipe).pop("prepare_run", None)
    for denoiser in denoisers_of(pipe).values():
        if hook_on(denoiser) is not None:
            remove_cache(denoiser)


def _prepare_run(pipe_of: Any, config: CacheConfig, *args: Any, **kwargs: Any) -> None:
    pipe = pipe_of()
    cached = hook_on(pipe.transformer) is not None
    take_off(pipe)
    pipe.prepare_run(*args, **kwargs)
    if cached:
        put_on(pipe, config)


class xFuserFastCachePipelineWrapper:  # the name in FastCache's documents
    """A pipeline whose step cache is switched on and off; it is the pipeline in all other respects.

    All else is read from and set on the pipeline, and it passes for an instance of the pipeline's
    class. Handed to `xDiTParallel` or to a pipeline class of xfuser, it becomes a wrapper of the
    parallel pipeline, which runs cached. Every rank makes the same calls.

    Args:
        pipeline: a diffusers pipeline with a supported transformer, or xfuser's class around one.

    Attributes:
        fastcache_config: the options that `enable_fastcache` was given; None where it is off.

    Raises:
        TypeError, ValueError: what is given has no transformer that is supported.

    Example:
        ::

            pipe = xFuserFastCachePipelineWrapper(FluxPipeline.from_pretrained(model))
            pipe.enable_fastcache(cache_ratio_threshold=0.05)
            images = pipe(prompt="a red ring").images
            print(pipe.get_cache_statistics()["block_approx_ratio"])
            pipe.disable_fastcache()

    Source: the usage blocks of FastCache's documents.
    """

    _OWN = frozenset({"_pipeline", "fastcache_config"})
    fastcache_config: CacheConfig | None

    def __init__(self, pipeline: Any):
        denoisers_of(pipeline)  # or say what is missing
        self._pipeline = pipeline
        self.fastcache_config = None

    def enable_fastcache(self, **options: Any) -> None:
        """Put a cache on; one that is on already is replaced.

        Args:
            **options: fields of `CacheConfig`; `use_cache` is "Fast" where it is left out.

        Raises:
            ValueError, TypeError, ConsensusError: as `apply_cache_on_transformer`.
        """
        config = CacheConfig.from_dict({"use_cache": "Fast", **options})
        self.disable_fastcache()
        put_on(self._pipeline, config)
        self.fastcache_config = config

    def disable_fastcache(self) -> None:
        """Take the cache off and restore the pipeline exactly; nothing where there is none."""
        take_off(self._pipeline)
        self.fastcache_config = None

    def get_cache_statistics(self) -> dict[str, Any]:
        """Return what the cache did, as `xfuser_fastcache.get_cache_statistics`.

        Raises:
            ValueError: the cache is off.
        """
        self._check_enabled()
        return get_cache_statistics(self._pipeline.transformer)

    def reset_cache_statistics(self) -> None:
        """Start the counters anew.

        Raises:
            ValueError: the cache is off.
        """
        self._check_enabled()
        reset_cache_statistics(self._pipeline.transformer)

    def to(self, *args: Any, **kwargs: Any) -> xFuserFastCachePipelineWrapper:
        """Move the pipeline, and return this wrapper around it."""
        self._pipeline.to(*args, **kwargs)
        return self

    def release_pipeline(self) -> Any:
        """Return the pipeline without its cache, for xfuser to convert it."""
        take_off(self._pipeline)
        return self._pipeline

    def follow_pipeline(self, pipeline: Any, config: CacheConfig | None) -> None:
        """Wrap another pipeline from now on, which has the cache of `config` on."""
        self._pipeline = pipeline
        self.fastcache_config = config

    def _check_enabled(self) -> None:
        if hook_on(self._pipeline.transformer) is None:
            raise ValueError("the cache is off; call enable_fastcache() first")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline."""
        return self._pipeline(*args, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._pipeline)

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:  # an empty copy, which is still to be filled
            raise AttributeError(name)
        return getattr(self._pipeline, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        elif self.fastcache_config is not None and name in denoisers_of(self._pipeline):
            take_off(self._pipeline)
            setattr(self._pipeline, name, value)
            put_on(self._pipeline, self.fastcache_config)
        else:
            setattr(self._pipeline, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._pipeline, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(xFuserFastCachePipelineWrapper), *dir(self._pipeline)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._pipeline!r})"

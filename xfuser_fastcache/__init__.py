"""A step cache for diffusion transformers that keeps working on all GPUs at once."""

from typing import TYPE_CHECKING, Any

from xfuser_fastcache.xdit.integration import install

if TYPE_CHECKING:
    from xfuser_fastcache.apply import (
        apply_cache_on_pipeline,
        apply_cache_on_transformer,
        get_cache_statistics,
        get_cache_trace,
        remove_cache,
        remove_cache_from_pipeline,
        reset_cache_statistics,
    )
    from xfuser_fastcache.clock.ownership import TransformerInUse
    from xfuser_fastcache.config.by_backend import (
        AdaCacheConfig,
        CustomCacheConfig,
        FastCacheConfig,
        FbCacheConfig,
        MagnitudeCacheConfig,
        TaylorCacheConfig,
        TeaCacheConfig,
    )
    from xfuser_fastcache.config.cache_config import CacheConfig
    from xfuser_fastcache.consensus.errors import ConsensusError, ConsensusTimeout
    from xfuser_fastcache.reports.views import (
        comparison_sheet,
        save_heat_map,
        statistics_table,
        write_trace,
    )
    from xfuser_fastcache.summaries import CacheSummary, summary

__version__ = "0.2.0"

__all__ = [
    "AdaCacheConfig",
    "CacheConfig",
    "CacheSummary",
    "ConsensusError",
    "ConsensusTimeout",
    "CustomCacheConfig",
    "FastCacheConfig",
    "FbCacheConfig",
    "MagnitudeCacheConfig",
    "TaylorCacheConfig",
    "TeaCacheConfig",
    "TransformerInUse",
    "apply_cache_on_pipeline",
    "apply_cache_on_transformer",
    "comparison_sheet",
    "get_cache_statistics",
    "get_cache_trace",
    "remove_cache",
    "remove_cache_from_pipeline",
    "reset_cache_statistics",
    "save_heat_map",
    "statistics_table",
    "summary",
    "write_trace",
]

_HOME = {
    "AdaCacheConfig": "config.by_backend",
    "CustomCacheConfig": "config.by_backend",
    "FastCacheConfig": "config.by_backend",
    "FbCacheConfig": "config.by_backend",
    "MagnitudeCacheConfig": "config.by_backend",
    "TaylorCacheConfig": "config.by_backend",
    "TeaCacheConfig": "config.by_backend",
    "CacheConfig": "config.cache_config",
    "ConsensusError": "consensus.errors",
    "ConsensusTimeout": "consensus.errors",
    "TransformerInUse": "clock.ownership",
    "comparison_sheet": "reports.views",
    "save_heat_map": "reports.views",
    "statistics_table": "reports.views",
    "write_trace": "reports.views",
    "CacheSummary": "summaries",
    "summary": "summaries",
}


def __getattr__(name: str) -> Any:
    # Importing the package must not import diffusers or torch; its names come when asked for.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME.get(name, 'apply')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Neither xfuser nor diffusers is imported by it; see docs/xdit.md.
install()

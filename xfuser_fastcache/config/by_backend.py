"""A config class a backend, for those who say `transformer.enable_cache(FastCacheConfig())`.

Each is `CacheConfig` with `use_cache` settled. The names leave alone those that diffusers has for
caches of its own (`FirstBlockCacheConfig`, `TaylorSeerCacheConfig`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.config.checks import choice, option


def _settled(backend: str) -> Any:
    return option(backend, choice(backend), "the backend that this class is for")


@dataclass(frozen=True, kw_only=True)
class FastCacheConfig(CacheConfig):
    """FastCache's chi-square test of the change, or a budget of steps.

    Example:
        >>> FastCacheConfig(computed_steps=10).use_cache
        'Fast'
    """

    use_cache: str = _settled("Fast")


@dataclass(frozen=True, kw_only=True)
class FbCacheConfig(CacheConfig):
    """The change of the first block's residual, as ParaAttention and xDiT's FBCache ask."""

    use_cache: str = _settled("Fb")


@dataclass(frozen=True, kw_only=True)
class TeaCacheConfig(CacheConfig):
    """The accumulated change of the modulated input, as TeaCache asks."""

    use_cache: str = _settled("Tea")


@dataclass(frozen=True, kw_only=True)
class TaylorCacheConfig(CacheConfig):
    """Every `cache_interval`-th step and a Taylor forecast between, as TaylorSeer does."""

    use_cache: str = _settled("TaylorSeer")


@dataclass(frozen=True, kw_only=True)
class AdaCacheConfig(CacheConfig):
    """The rate of change picks from a codebook how many steps are skipped, as AdaCache does."""

    use_cache: str = _settled("Ada")


@dataclass(frozen=True, kw_only=True)
class CustomCacheConfig(CacheConfig):
    """TeaCache's rule with a polynomial of your own in `coefficients`, as LightX2V has it."""

    use_cache: str = _settled("Custom")


@dataclass(frozen=True, kw_only=True)
class MagnitudeCacheConfig(CacheConfig):
    """A law of residuals' magnitudes, measured once for a model, as MagCache has it."""

    use_cache: str = _settled("Mag")

"""diffusers' own way to a cache: `transformer.enable_cache(FastCacheConfig())`, `disable_cache()`.

`install` lets `CacheMixin` know our configs, and gives its methods to models of ours that lack it.
Whatever else is asked of them, diffusers answers as it does without us.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from xfuser_fastcache.patching import Changes

logger = logging.getLogger("xfuser_fastcache")
CHANGES = Changes()


def _enabling(original: Callable[..., None]) -> Callable[..., None]:
    def enable_cache(self: Any, config: Any) -> None:
        from xfuser_fastcache.apply import apply_cache_on_transformer
        from xfuser_fastcache.config.cache_config import CacheConfig

        if not isinstance(config, CacheConfig):
            return original(self, config)
        if self.is_cache_enabled:
            raise ValueError(
                f"a cache is enabled on this {type(self).__name__} already, by "
                f"{type(self._cache_config).__name__}; call disable_cache() first"
            )
        apply_cache_on_transformer(self, config=config)

    return enable_cache


def _disabling(original: Callable[..., None]) -> Callable[..., None]:
    def disable_cache(self: Any) -> None:
        from xfuser_fastcache.apply import remove_cache
        from xfuser_fastcache.config.cache_config import CacheConfig
        from xfuser_fastcache.hooks import hook_on

        ours = isinstance(self._cache_config, CacheConfig)
        if ours or hook_on(self) is not None:
            remove_cache(self)
        if not ours:  # perhaps one of diffusers' stands beside
            original(self)

    return disable_cache


# Name of a method -> what is put around it.
METHODS = {"enable_cache": _enabling, "disable_cache": _disabling}


class _Lacking:
    """What diffusers' `CacheMixin` gives a model, for those that it is no base of."""

    _cache_config: Any = None

    @property
    def is_cache_enabled(self) -> bool:
        """Whether a cache is on."""
        return self._cache_config is not None

    def enable_cache(self, config: Any) -> None:
        """Put a cache on; `config` is a CacheConfig of xfuser_fastcache, such as FastCacheConfig.

        Raises:
            ValueError: it is none, or a cache is on already.
        """
        raise ValueError(
            f"{type(config).__name__} is not for {type(self).__name__}, which diffusers gives no "
            "enable_cache; give a config of xfuser_fastcache, such as FastCacheConfig("
            "computed_steps=10)"
        )

    def disable_cache(self) -> None:
        """Take the cache off; nothing where none is on."""


def _patch_mixin(module: Any) -> None:
    mixin = getattr(module, "CacheMixin", None)
    if not all(name in getattr(mixin, "__dict__", {}) for name in METHODS):
        logger.warning(
            "enable_cache of this diffusers takes no config of xfuser_fastcache, since its "
            "CacheMixin is not as it is known; use apply_cache_on_transformer"
        )
        return
    for name, around in METHODS.items():
        CHANGES.wrap(mixin, name, around)


def _give(model_class: str) -> Callable[[Any], None]:
    def patch(module: Any) -> None:
        owner = getattr(module, model_class, None)
        # A diffusers that has made the mixin a base of it, or has moved it.
        if owner is None or hasattr(owner, "enable_cache"):
            return
        for name, value in vars(_Lacking).items():
            if not name.startswith("__"):
                around = METHODS.get(name)
                CHANGES.add(owner, name, value if around is None else around(value))

    return patch


_TRANSFORMERS = "diffusers.models.transformers"
PATCHES: dict[str, Callable[[Any], None]] = {
    "diffusers.models.cache_utils": _patch_mixin,
    f"{_TRANSFORMERS}.transformer_sd3": _give("SD3Transformer2DModel"),
    f"{_TRANSFORMERS}.pixart_transformer_2d": _give("PixArtTransformer2DModel"),
    f"{_TRANSFORMERS}.transformer_z_image": _give("ZImageTransformer2DModel"),
    f"{_TRANSFORMERS}.transformer_krea2": _give("Krea2Transformer2DModel"),
    f"{_TRANSFORMERS}.consisid_transformer_3d": _give("ConsisIDTransformer3DModel"),
    f"{_TRANSFORMERS}.sana_transformer": _give("SanaTransformer2DModel"),
    f"{_TRANSFORMERS}.transformer_lumina2": _give("Lumina2Transformer2DModel"),
    f"{_TRANSFORMERS}.hunyuan_transformer_2d": _give("HunyuanDiT2DModel"),
    f"{_TRANSFORMERS}.transformer_ideogram4": _give("Ideogram4Transformer2DModel"),
}

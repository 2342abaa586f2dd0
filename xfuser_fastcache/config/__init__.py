"""Config: options, checked, from keywords, YAML and JSON."""

from xfuser_fastcache.config.cache_config import CacheConfig

__all__ = ["CacheConfig"]

"""Model families that the cache knows, and the call that puts a cache on one."""

from xfuser_fastcache import apply_cache_on_transformer

__all__ = ["apply_cache_on_transformer"]

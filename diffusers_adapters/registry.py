"""The model families that are registered, by entry point."""

from __future__ import annotations

from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.plugins import ADAPTERS, loaded


def adapters() -> dict[str, type[ModelAdapter]]:
    """Return every registered adapter by name.

    Example:
        >>> adapters()["flux"].model_class
        'FluxTransformer2DModel'
    """
    return loaded(ADAPTERS)

"""diffusers' note on a model of the cache that is on it, which `is_cache_enabled` reads."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

logger = logging.getLogger("xfuser_fastcache")

# While it holds a config, `enable_cache` puts nothing on beside that.
_NOTE = "_cache_config"


class CacheNote:
    """Reads and writes the note on one model.

    Args:
        model: of diffusers.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        # What stood there before ours, if anything; None while ours does not stand there.
        self._before: dict[str, Any] | None = None
        self._warned_of: Any = None

    @property
    def _given(self) -> Any:
        return getattr(self.model, _NOTE, None)

    def write(self, config: Any) -> None:
        """Leave our config there, unless a cache of diffusers' is on."""
        if self._given is None:
            own = vars(self.model)
            self._before = {name: own[name] for name in (_NOTE,) if name in own}
            own[_NOTE] = config

    def erase(self) -> None:
        """Take our config back, if it stands there."""
        if self._before is not None:
            del vars(self.model)[_NOTE]
            vars(self.model).update(self._before)
            self._before = None

    def warn(self, own: str) -> None:
        """Say once where ours was put beside a cache of diffusers'.

        Args:
            own: name of ours.
        """
        if self._before is not None:
            return
        config, warned_of = self._given, self._warned_of
        self._warned_of = config
        if config is None or config is warned_of:
            return
        logger.warning(
            "Two caches are on this %s: %s of xfuser_fastcache, and diffusers' by "
            "enable_cache(%s). Each skips what the other would have measured, and diffusers' "
            "decides on each rank by itself. Call remove_cache(transformer) and "
            "transformer.disable_cache(), then put one of them on again.",
            *(type(self.model).__name__, own, type(config).__name__),
        )

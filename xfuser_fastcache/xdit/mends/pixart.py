"""Bugs of xfuser's PixArt; see `mends`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from xfuser_fastcache.xdit.compat import replace, require

MODULE = "xfuser.model_executor.layers.embeddings"
FORWARD = "xFuserPatchEmbedWrapper.forward"
_TABLE = "get_2d_sincos_pos_embed"


def keeps_another_table(source: str) -> bool:
    """A table of positions for another size takes the model's place, in float64."""
    return "self.module.pos_embed = pos_embed.unsqueeze(0)" in source


def keep_own_table(module: ModuleType) -> None:
    """Add positions as diffusers does: in float32 at another size, and the model's own at its own.

    The table of another size stayed, in float64, and so did what was made anew for the model's own
    size: the same call drew another picture after one of another size.
    """
    forward, table = require(module, FORWARD), require(module, _TABLE)

    @functools.wraps(table)
    def table_in_float32(*args: Any, **kwargs: Any) -> Any:
        return table(*args, **kwargs).float()

    @functools.wraps(forward)
    def forward_with_own_table(self: Any, latent: Any) -> Any:
        embed = self.module
        own = embed.pos_embed, embed.height, embed.width
        try:
            return forward(self, latent)
        finally:
            embed.pos_embed, embed.height, embed.width = own

    replace(module, _TABLE, table_in_float32)
    replace(module, FORWARD, forward_with_own_table)

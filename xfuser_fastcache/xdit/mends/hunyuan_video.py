"""A bug of xfuser's HunyuanVideo; see `mends`."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

from xfuser_fastcache.xdit.compat import replace, require

MODULE = "xfuser.model_executor.models.transformers.transformer_hunyuan_video"
FORWARD = "xFuserHunyuanVideoTransformer3DWrapper.forward"


def shares_unevenly(source: str) -> bool:
    """Tokens are cut into as many parts as ranks, and neither padded nor counted before."""
    return "torch.chunk(hidden_states" in source and "pad" not in source


def refuse_uneven_shares(module: ModuleType) -> None:
    """Say which tokens the ranks cannot share, in place of the error of whoever sends them.

    They cannot be padded here: between them stands text, and `USP` can only be told of padding
    behind all keys.
    """
    forward = require(module, FORWARD)
    ranks_of = require(module, "get_sequence_parallel_world_size")

    @functools.wraps(forward)
    def forward_of_even_shares(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        config, ranks = self.config, ranks_of()
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        sizes = tuple(size // of for size, of in zip(hidden_states.shape[2:], patch, strict=True))
        if math.prod(sizes) % ranks:
            raise ValueError(
                f"HunyuanVideo of {sizes} tokens (frames, height, width): {math.prod(sizes)} do "
                f"not divide by the {ranks} ranks of ulysses_degree x ring_degree, and xDiT does "
                "not pad them. Give another height, width or num_frames, or fewer ranks."
            )
        return forward(self, hidden_states, *args, **kwargs)

    replace(module, FORWARD, forward_of_even_shares)

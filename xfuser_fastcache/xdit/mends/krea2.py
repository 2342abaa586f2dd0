"""Bugs of xfuser's Krea-2; see `mends`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from xfuser_fastcache.xdit.compat import replace, require

MODULE = "xfuser.model_executor.models.transformers.transformer_krea2"
FORWARD = "xFuserKrea2Transformer2DWrapper.forward"


def keep_masks_by_tensor(module: ModuleType) -> None:
    """Keep the mask of all tokens by the text's mask itself, and not by its address.

    An address is given again: the next text at it was masked as the one before. Kept for each
    tensor, both guidance branches have theirs, without a wait for the device at every call.
    """
    forward = require(module, FORWARD)
    # Mask of a text -> batch and image tokens beside it, and what xfuser keeps for it.
    kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @functools.wraps(forward)
    def forward_with_own_mask(
        self: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        position_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        mask, beside = encoder_attention_mask, hidden_states.shape[:2]
        if mask is not None:
            of, found = kept.get(mask, (None, None))
            self._attn_mask_cache = found if of == beside else None
        given = (hidden_states, encoder_hidden_states, timestep, position_ids, mask)
        made = forward(self, *given, **kwargs)
        if mask is not None:
            kept[mask] = beside, self._attn_mask_cache
        return made

    replace(module, FORWARD, forward_with_own_mask)

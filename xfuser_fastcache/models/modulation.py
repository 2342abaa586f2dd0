"""What the first block's attention is given, in families that modulate alike."""

from __future__ import annotations

from typing import Any

import torch


def by_own_table(block: Any, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """Return a block's first norm, shifted and scaled by its own table and the timestep's.

    PixArt, SANA, Latte and LTX-2 have it: shift and scale come first of the table's rows.

    Args:
        block: with `norm1` and `scale_shift_table`, `(parameters, dim)`.
        hidden_states: `(batch, tokens, dim)`.
        temb: for each item, or for each of its tokens: parameters x dim numbers.

    Returns:
        `(batch, tokens, dim)`.
    """
    table = block.scale_shift_table
    given = temb.reshape(hidden_states.shape[0], -1, *table.shape)
    shift, scale = (table + given).unbind(2)[:2]
    return block.norm1(hidden_states) * (1 + scale) + shift

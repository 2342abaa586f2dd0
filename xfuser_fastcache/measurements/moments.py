"""The additive statistics of a tensor, in fixed point: sums that any sharding leaves alone.

Every token is measured and rounded to an integer by itself; integers add up to the same bits in
any order. So neither the order of ranks nor the way in which tokens are sharded changes a sum.

A token's size is its squared L2 norm, or its L1 norm where a gate's published rule asks for that.
A number of `TOKEN_BITS` bits is cut into two limbs before it is added, so that the sums of 2**40
tokens fit. Layout of one group of moments, all int64; the first three are sums of upper limbs, and
those of lower limbs stand `LOWER` slots behind them:

| slot | sum over image tokens and batch of | unit |
| --- | --- | --- |
| CHANGE | q = size of the change against the reference | 2**-FRACTION of the scale |
| CHANGE_SQUARED | q squared | 2**-FRACTION_SQUARED of the scale squared |
| REFERENCE | size of the reference (without one, of the tensor) | as CHANGE |
| TOKENS | 1 | tokens |
| NONFINITE | 1 where a moment of the token is not finite; it adds nothing above | tokens |
| OVERFLOW | 1 where a finite moment of the token does not fit and is clamped | tokens |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

CHANGE, CHANGE_SQUARED, REFERENCE = range(3)
LOWER = 3
TOKENS, NONFINITE, OVERFLOW = range(6, 9)
SLOTS = 9

FRACTION = 26
# Room for a token that changes by 2**9 times the mean energy; coarse for small changes, which all
# round to 0 together where no token stands out: the gate then takes its cap.
FRACTION_SQUARED = 24
# A token's moment is at most 2**TOKEN_BITS, and each of its limbs at most 2**LIMB_BITS, so that
# 2**(61 - LIMB_BITS) tokens add up without wrap.
TOKEN_BITS = 42
LIMB_BITS = TOKEN_BITS // 2
MAX_TOKENS = 2 ** (61 - LIMB_BITS)
# Before any reduced reference is known: room for a token of squared norm 2**29 (FLUX at RMS 300).
INITIAL_EXPONENT = 14
# Squared norms below 2**-126 are no float32.
SMALLEST_EXPONENT = -126


@dataclass(frozen=True)
class Reference:
    """What a tensor is measured against, such as a span's input at its last computed step.

    Attributes:
        hidden_states: `(batch, tokens, dim)`.
        energy: size of each token, `(batch, tokens)`, float32.
        norm: 2 where sizes are squared L2 norms, 1 where they are L1 norms.
    """

    hidden_states: torch.Tensor
    energy: torch.Tensor
    norm: int = 2

    @classmethod
    def of(cls, hidden_states: torch.Tensor, norm: int = 2) -> Reference:
        """Measure `hidden_states`; the tensor is kept, so hand over one that nobody overwrites."""
        return cls(hidden_states, _size(hidden_states, norm), norm)


@dataclass(frozen=True)
class Moments:
    """One group of reduced moments in physical units.

    Attributes:
        change: Q, sum of the sizes of changes: squared L2 norms, or L1 norms.
        change_squared: sum of their squares.
        reference: R, sum of the sizes of the reference.
        tokens: number of tokens, over the batch and all ranks.
        nonfinite: tokens whose moments were not finite.
        overflow: tokens whose finite moments did not fit, or that are too many to add up.
    """

    change: float
    change_squared: float
    reference: float
    tokens: int
    nonfinite: int
    overflow: int

    @classmethod
    def decode(cls, slots: list[int], exponent: int) -> Moments:
        """Read one group of integers that were encoded at scale `2**exponent`."""
        unit = 2.0 ** (exponent - FRACTION)
        return cls(
            change=joined(slots, CHANGE) * unit,
            change_squared=joined(slots, CHANGE_SQUARED) * 2.0 ** (2 * exponent - FRACTION_SQUARED),
            reference=joined(slots, REFERENCE) * unit,
            tokens=slots[TOKENS],
            nonfinite=slots[NONFINITE],
            overflow=slots[OVERFLOW] + max(0, slots[TOKENS] - MAX_TOKENS),
        )

    def next_exponent(self, exponent: int) -> int:
        """Return the scale for the next measurement: a power of two near the mean reference."""
        if self.tokens == 0 or self.nonfinite:
            return exponent
        # Clamped sums say only that the scale was too small, zeros that it was too large.
        if self.overflow:
            return exponent + 12
        if self.reference <= 0:
            return max(exponent - 24, SMALLEST_EXPONENT)
        return math.ceil(math.log2(self.reference / self.tokens))


NOTHING = Moments(0.0, 0.0, 0.0, tokens=0, nonfinite=0, overflow=0)


def joined(slots: list[int], sum_of: int) -> int:
    """Return a sum from those of its limbs, as a Python integer, which has no width.

    Args:
        slots: of one group.
        sum_of: `CHANGE`, `CHANGE_SQUARED` or `REFERENCE`.
    """
    return (slots[sum_of] << LIMB_BITS) + slots[sum_of + LOWER]


def _size(x: torch.Tensor, norm: int) -> torch.Tensor:
    """Return the size of each token, `(batch, tokens)`, accumulated in float32."""
    # Strides decide the order in which a token's channels are added; ranks must not differ in it.
    dtype = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x.contiguous(), ord=norm, dim=-1, dtype=dtype).float()
    return size.square_() if norm == 2 else size


def measure(
    hidden_states: torch.Tensor, reference: Reference | None, exponent: int, norm: int = 2
) -> torch.Tensor:
    """Return the moments of this rank's tokens against `reference`; no host synchronisation.

    Args:
        hidden_states: image tokens `(batch, tokens, dim)`.
        reference: what to measure against; None leaves the change at 0 and the reference slot at
            the tensor's own energy, from which the next scale follows.
        exponent: the scale is `2**exponent`; the same on all ranks.
        norm: 2 for squared L2 norms, 1 for L1 norms; that of the reference.

    Returns:
        int64 tensor `(SLOTS,)` on the device of `hidden_states`.

    Example:
        >>> x = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
        >>> old = Reference.of(torch.tensor([[[3.0, 3.0], [1.0, 0.0]]]))
        >>> m = Moments.decode(measure(x, old, exponent=3).tolist(), exponent=3)
        >>> round(m.change, 4), round(m.reference, 4), m.tokens
        (1.0, 19.0, 2)
    """
    scale = 2.0**-exponent
    top = scale * 2.0**FRACTION
    if reference is None:
        energy = _size(hidden_states, norm)
        change = torch.zeros_like(energy)
    else:
        energy = reference.energy
        change = _size(hidden_states - reference.hidden_states, norm)
    # Scaled before it is squared: the square of a large norm would leave float32.
    change = change * scale
    values = torch.stack(
        (change * 2.0**FRACTION, change.square() * 2.0**FRACTION_SQUARED, energy * top)
    )
    finite = values.sum(0).isfinite().sum()
    # What is not finite adds nothing; what does not fit is clamped, and bit TOKEN_BITS marks it.
    values.nan_to_num_(nan=0.0, posinf=0.0).clamp_(max=2.0**TOKEN_BITS).round_()
    numbers = values.to(torch.int64)
    # This sum may wrap; the difference below is right all the same, as it is below 2**63 itself.
    whole = numbers.sum(dim=(1, 2))
    upper = numbers.bitwise_right_shift_(LIMB_BITS).sum(dim=(1, 2))
    lower = whole - (upper << LIMB_BITS)
    marks = numbers.bitwise_right_shift_(TOKEN_BITS - LIMB_BITS)
    overflow = marks.amax(0).sum() if change.numel() else finite
    tokens = torch.full_like(finite, change.numel())
    return torch.cat((upper, lower, torch.stack((tokens, tokens - finite, overflow))))

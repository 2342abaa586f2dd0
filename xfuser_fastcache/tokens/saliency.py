"""The motion/static split: tokens that moved run through the blocks, the others are forecast."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch

from xfuser_fastcache.config.capabilities import Capability
from xfuser_fastcache.config.checks import choice, number, numbers, option
from xfuser_fastcache.measurements.moments import Reference
from xfuser_fastcache.tokens.base import Narrowing, TokenMethod

# Token counts are rounded up to so many equal parts of all tokens: as many shapes, at most, meet
# a compiled block.
BUCKETS = 8
# Thresholds that depend on the largest saliency are rounded down to a power of sqrt(2); a token
# that changed by less than 0.1 % or more than 3000 % is beyond them.
LADDER = (0.0, *(2.0 ** (half / 2) for half in range(-40, 21)))


def token_saliency(hidden_states: torch.Tensor, reference: Reference) -> torch.Tensor:
    r"""Return :math:`S_i = \|x_i - \bar x_i\|^2 / \|\bar x_i\|^2`, the squared relative change.

    :math:`\bar x_i` is the token when it was last computed, so that slow drift adds up until it is
    computed again. A token that is not finite has infinite saliency.

    Args:
        hidden_states: `(batch, tokens, dim)`.
        reference: of the same shape.

    Returns:
        `(batch, tokens)`, float32.

    Source: FastCache, arXiv 2505.20353. Deviation: against the token's own energy, so that one
    threshold serves models of any scale.
    """
    change = hidden_states.float() - reference.hidden_states.float()
    smallest = torch.finfo(torch.float32).tiny
    ratio = torch.linalg.vector_norm(change, dim=-1).square_() / reference.energy.clamp(smallest)
    return ratio.nan_to_num_(nan=float("inf"), posinf=float("inf"))


def counts_above(saliency: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Return how many tokens reach each edge, in the batch item that has most of them.

    Args:
        saliency: `(batch or 1, tokens)`.
        edges: `(edges,)`, float32.

    Returns:
        int64 `(edges,)`; no host synchronisation.

    Example:
        >>> counts_above(torch.tensor([[0.0, 0.2], [0.3, 0.2]]), torch.tensor([0.0, 0.2, 0.25]))
        tensor([2, 2, 1])
    """
    return (saliency[..., None] >= edges).sum(dim=1).amax(dim=0)


def bucket(moving: int, tokens: int) -> int:
    """Return how many tokens are computed where `moving` move: in `BUCKETS` sizes, at least one.

    Example:
        >>> [bucket(moving, 64) for moving in (0, 8, 9, 64, 70)]
        [8, 8, 16, 64, 64]
        >>> bucket(0, 1), bucket(1, 5)
        (1, 2)
    """
    parts = min(max(-(-moving * BUCKETS // tokens), 1), BUCKETS)
    return -(-parts * tokens // BUCKETS)


@dataclass(frozen=True)
class MotionStatic(TokenMethod):
    r"""Tokens that moved run through the blocks; a static one is forecast.

    A token moves when its saliency reaches :math:`\tau`: `motion_threshold`, or with
    `adaptive_beta` :math:`\beta_0 + \beta_1 S_{var} + \beta_2 t + \beta_3 t^2`, where
    :math:`S_{var}` is the largest saliency of any token of any rank. Then both are rounded down to
    an edge, since only counts at edges are known to all ranks: never does a token count as static
    that is not.

    Source: FastCache's adaptive threshold. Deviations: `S_var` is the saliency of this module, and
    t is the noise level over that of the generation's first step, 1 to 0, for every model.
    """

    offers = frozenset({Capability.MAPS_TAKER})
    takes_maps = True

    motion_threshold: float = option(
        # FastCache's own is 0.1, in no unit; docs/methods/tokens.md has what was measured.
        0.01,
        number(),
        "a token moves when its squared relative change since it was last computed reaches it "
        "(ratio); 0: every token",
    )
    adaptive_beta: list[float] | None = option(
        None,
        numbers(4, 4),
        "in place of motion_threshold: b0 + b1 * the largest saliency + b2 * t + b3 * t^2, with t "
        "from 1 at the first step to 0",
    )
    static_kv: str = option(
        "reuse",
        choice("reuse", "drop"),
        "keys and values of static tokens; reuse: the last ones stay in attention; drop: none, "
        "FastCache to the letter",
    )

    @property
    def edges(self) -> tuple[float, ...]:
        """Saliencies at which tokens are counted, ascending."""
        return (self.motion_threshold,) if self.adaptive_beta is None else LADDER

    def moving(self, counts: list[list[int]], time: float) -> int:
        """Return the largest number of moving tokens of any rank; alike on every rank.

        Args:
            counts: of tokens that reach each edge, a list a rank.
            time: t, from 1 at the generation's first step to 0.
        """
        most = [max(column) for column in zip(*counts, strict=True)]
        if self.adaptive_beta is None:
            return most[0]
        largest = max((e for e, count in zip(LADDER, most, strict=True) if count), default=0.0)
        constant, by_saliency, linear, square = self.adaptive_beta
        tau = constant + by_saliency * largest + linear * time + square * time * time
        return most[max(bisect.bisect_right(LADDER, tau) - 1, 0)]


class Split(Narrowing):
    """The tokens that moved most; a static token is left as it was.

    Args:
        saliency: `(batch, tokens)`, or `(1, tokens)` where all items take the same tokens.
        count: how many tokens of each item.
    """

    def __init__(self, saliency: torch.Tensor, count: int):
        self._rows = saliency.topk(count, dim=1, sorted=False).indices.sort(dim=1).values

    @property
    def rows(self) -> torch.Tensor:
        """The chosen tokens."""
        return self._rows

    def _index(self, x: torch.Tensor) -> torch.Tensor:
        return self._rows[..., None].expand(x.shape[0], -1, x.shape[2])

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """Return the chosen tokens."""
        return x.gather(1, self._index(x))

    def widen(self, x: torch.Tensor, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """Return all tokens, the chosen ones as they left the block."""
        return x.scatter(1, self._index(x), left)

    def mixed(self, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return `now` of the chosen tokens and `before` of the others, `(batch, tokens, any)`."""
        return before.scatter(1, self._index(now), self.narrow(now))

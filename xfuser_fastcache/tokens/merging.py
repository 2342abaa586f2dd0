"""Token merging: neighbours that look alike run through the blocks as one token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from xfuser_fastcache.config.checks import integer, number, option
from xfuser_fastcache.tokens.base import Narrowing, TokenMethod

# Consecutive tokens among which neighbours are searched: memory is tokens x WINDOW.
WINDOW = 16
_SMALLEST = torch.finfo(torch.float32).tiny


def _windows(x: torch.Tensor) -> torch.Tensor:
    """Cut `(batch, tokens, dim)` into `(batch, windows, WINDOW, dim)`; zeros fill the last one."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % WINDOW)).unflatten(1, (-1, WINDOW))


def _filling(x: torch.Tensor) -> torch.Tensor:
    """Say which places of the windows hold no token of `x`: bool `(windows, WINDOW)`."""
    tokens = x.shape[1]
    places = torch.arange(tokens + -tokens % WINDOW, device=x.device)
    return (places >= tokens).unflatten(0, (-1, WINDOW))


def _distances(x: torch.Tensor) -> torch.Tensor:
    """Return squared distances within windows, `(batch, windows, WINDOW, WINDOW)`, float32."""
    windows = _windows(x.float())
    # Tokens of a window share most of what they are; without it the differences keep their digits.
    windows = windows - windows[:, :, :1]
    energy = windows.square().sum(-1)
    product = windows @ windows.transpose(2, 3)
    return (energy[..., None] + energy[..., None, :] - 2 * product).clamp_(min=0)


def importance(
    x: torch.Tensor, temporal: torch.Tensor | None, neighbours: int, weight: float
) -> torch.Tensor:
    r"""Return :math:`S_i = \rho_{sp,i} (1 + \lambda \rho_{tm,i})`, `(batch, tokens)`, float32.

    :math:`\rho_{sp,i} = \exp(-\frac{1}{K e} \sum_{j \in kNN(i)} \|h_i - h_j\|^2)`, where `e` is the
    mean squared norm of the item's tokens. Neighbours are those in the token's window; where it
    holds fewer than K, all of them.

    Args:
        x: `(batch, tokens, dim)`.
        temporal: :math:`\rho_{tm}`, `(batch, tokens)`; None where nothing is known.
        neighbours: K.
        weight: lambda.

    Source: FastCache's token merging. Deviation: distances are divided by `e`; without it the
    exponential is 0 for every token of a wide model.
    """
    strangers = _filling(x)[:, None, :] | torch.eye(WINDOW, dtype=torch.bool, device=x.device)
    others = _distances(x).masked_fill(strangers, math.inf)
    nearest = others.sort(dim=-1).values[..., : min(neighbours, WINDOW - 1)]
    found = nearest.isfinite()
    mean = nearest.masked_fill(~found, 0).sum(-1) / found.sum(-1).clamp(min=1)
    energy = x.float().square().sum(-1).mean(dim=1).clamp(min=_SMALLEST)
    score = torch.exp(-mean / energy[:, None, None]).flatten(1)[:, : x.shape[1]]
    if temporal is not None:
        score = score * (1 + weight * temporal)
    return score.clamp(min=_SMALLEST, max=1 / _SMALLEST)


class Clusters(Narrowing):
    r"""Clusters of neighbouring tokens: :math:`\tilde h = \sum S_j h_j / \sum S_j`.

    The most important tokens of a window are centres, and each other token joins the nearest centre
    of its window. Afterwards a token takes what its cluster has gained,
    :math:`h + (\tilde h_{left} - \tilde h_{entered})`: a block that changes nothing leaves all
    tokens as they were. A cluster stands in its centre's place.

    Args:
        x: tokens to be clustered, `(batch, tokens, dim)`; no cluster spans two items.
        score: importance, `(batch, tokens)`, above 0.
        ratio: of tokens that are left, between 0 and 1; each window keeps that part of its own,
            rounded up, so that their number depends on `tokens` alone.
        same_rows: whether all items have the same centres, those most important on average.

    Source: FastCache's LocalCTM and multi-stage aggregation. Deviation: what comes back is the
    change, where the published sum adds a whole hidden state a stage.
    """

    def __init__(self, x: torch.Tensor, score: torch.Tensor, ratio: float, same_rows: bool = False):
        tokens = x.shape[1]
        in_last = (tokens - 1) % WINDOW + 1
        kept, kept_in_last = math.ceil(ratio * WINDOW), math.ceil(ratio * in_last)
        filling = _filling(x)
        score = _windows(score[..., None])[..., 0]

        rank = score.mean(dim=0, keepdim=True) if same_rows else score
        centres = rank.masked_fill(filling, -1.0).topk(kept, dim=2).indices
        # WINDOW stands for no centre, of which the last window may have some.
        centres[:, -1, kept_in_last:] = WINDOW
        centres = centres.sort(dim=2).values
        starts = torch.arange(len(filling), device=x.device)[:, None]
        count = kept * (len(filling) - 1) + kept_in_last
        self._rows = (centres + starts * WINDOW).flatten(1)[:, :count]

        # From each token to the centres of its window: (batch, windows, WINDOW, kept).
        towards = centres[:, :, None, :].expand(x.shape[0], -1, WINDOW, -1)
        distances = _distances(x).gather(3, towards.clamp(max=WINDOW - 1))
        distances = distances.masked_fill(towards == WINDOW, math.inf)
        # A centre stays by itself, also where another one equals it.
        itself = towards == torch.arange(WINDOW, device=x.device)[:, None]
        joined = distances.masked_fill(itself, -1.0).argmin(dim=3)
        self._cluster = (joined + starts * kept).flatten(1)[:, :tokens]

        # What fills the last window has no score, and so no share.
        members = F.one_hot(joined, kept) * score[..., None]
        shares = members / members.sum(dim=2, keepdim=True).clamp(min=_SMALLEST)
        self._shares = shares.transpose(2, 3)

    @property
    def rows(self) -> torch.Tensor:
        """The clusters' centres."""
        return self._rows

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """Return the clusters' weighted means."""
        means = self._shares.to(x.dtype) @ _windows(x)
        return means.flatten(1, 2)[:, : self._rows.shape[1]]

    def widen(self, x: torch.Tensor, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """Return each token with what its cluster has gained."""
        index = self._cluster[..., None].expand(-1, -1, x.shape[2])
        return x + (left - entered).gather(1, index)


@dataclass(frozen=True)
class Merging(TokenMethod):
    """Later blocks run on clusters of the tokens that the earlier ones ran on.

    Their numbers are fixed, so that ranks agree on them without a word.

    Source: FastCache's token merging; see `importance` and `Clusters`.
    """

    token_merge_k: int = option(5, integer(1), "neighbours that tell how dense a token stands")
    token_merge_lambda: float = option(
        1.0, number(), "weight of a token's relative change beside its density"
    )
    num_stages: int = option(
        3, integer(1, 100), "equal parts of the blocks; each but the first merges once more"
    )
    merge_ratio: float = option(
        0.5,
        number(0, 1, ends=False),
        "tokens that a merge leaves (ratio)",
    )

    def links_at(self, index: int, blocks: int) -> int:
        """Return the stage that a block lies in, counted from 0."""
        return index * self.num_stages // blocks

    def link(self, x: torch.Tensor, change: torch.Tensor, same_rows: bool) -> Narrowing:
        """Return clusters of the tokens that are left."""
        score = importance(x, change, self.token_merge_k, self.token_merge_lambda)
        return Clusters(x, score, self.merge_ratio, same_rows)

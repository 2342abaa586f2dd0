"""What a token plan makes of a computed span: few image tokens in its blocks, all outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.streams import Streams


class CannotForecast(Exception):
    """What stands in for blocks or tokens has found no place: the forward pass runs again."""


class Narrowing(ABC):
    """Image tokens that stand for more of them.

    Between blocks all tokens are there, so whatever the model or a pipeline does there finds the
    shapes that it expects.
    """

    @property
    @abstractmethod
    def rows(self) -> torch.Tensor:
        """The token whose place each of the few has: `(batch or 1, few)`, int64, ascending."""

    @abstractmethod
    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """Return the few tokens `(batch, few, dim)` of all of them `(batch, tokens, dim)`."""

    @abstractmethod
    def widen(self, x: torch.Tensor, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """Return all tokens after a block.

        Args:
            x: all tokens before it, `(batch, tokens, dim)`.
            entered: the few that entered it, `narrow(x)`.
            left: the few as they left it, same shape.
        """


class Chain(Narrowing):
    """Narrowings one after another, each of what the one before has left.

    Args:
        links: at least one, the first of all tokens.
    """

    def __init__(self, links: Sequence[Narrowing]):
        self.links = links

    @property
    def rows(self) -> torch.Tensor:
        """Places of the last narrowing's tokens among all of them."""
        rows = self.links[0].rows
        for link in self.links[1:]:
            batch = max(len(rows), len(link.rows))
            rows = rows.expand(batch, -1).gather(1, link.rows.expand(batch, -1))
        return rows

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """Narrow link by link."""
        for link in self.links:
            x = link.narrow(x)
        return x

    def widen(self, x: torch.Tensor, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """Widen link by link, backwards."""
        before = [x]
        for link in self.links[:-1]:
            before.append(link.narrow(before[-1]))
        before.append(entered)
        for link, all_tokens, few in zip(
            reversed(self.links), before[-2::-1], before[:0:-1], strict=True
        ):
            left = link.widen(all_tokens, few, left)
        return left


def run_narrowed(
    narrowing: Narrowing,
    contract: BlockContract,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    slice_tables: bool = True,
) -> Any:
    """Run a block on fewer image tokens and all text tokens; returns what it would with all.

    Args:
        narrowing: which tokens.
        contract: of the block.
        forward: the block's own.
        args, kwargs: its arguments.
        slice_tables: whether tables with a row a token are narrowed too.
    """
    x = contract.read(args, kwargs).hidden_states
    few = narrowing.narrow(x)
    rows = narrowing.rows if slice_tables else None
    args, kwargs = contract.replaced(args, kwargs, few, x.shape[1], rows)
    output = contract.unpack(forward(*args, **kwargs))
    every = narrowing.widen(x, few, output.hidden_states)
    return contract.pack(Streams(every, output.encoder_hidden_states))

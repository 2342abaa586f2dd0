"""What token plans share: few image tokens in the blocks of a computed span, all outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from xfuser_fastcache.config.capabilities import Capability
from xfuser_fastcache.config.checks import CheckedOptions
from xfuser_fastcache.models.block_contract import BlockContract


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


class TokenMethod(CheckedOptions):
    """A way to choose tokens: a frozen dataclass of its options.

    It holds no state. A subclass says at which blocks it narrows the tokens further, and how.
    Where several are asked for, each narrows what those before it have left.

    Attributes:
        needs, offers, withholds: see `config.capabilities`.
        takes_maps: whether fitted linear maps are for the tokens that it leaves out.
    """

    needs: ClassVar[Collection[Capability]] = frozenset({Capability.BLOCKS})
    offers: ClassVar[Collection[Capability]] = frozenset()
    withholds: ClassVar[Collection[Capability]] = frozenset({Capability.ALL_TOKENS})
    takes_maps: ClassVar[bool] = False

    def links_at(self, index: int, blocks: int) -> int:
        """Return how many narrowings of its own are in force at a block; it never falls.

        Args:
            index: of the block.
            blocks: their number.
        """
        return 0

    def link(self, x: torch.Tensor, change: torch.Tensor, same_rows: bool) -> Narrowing:
        """Return the next narrowing; a function of the arguments alone, alike on every rank in the
        number of tokens that it leaves.

        Args:
            x: the tokens that are left, as they enter the block, `(batch, tokens, dim)`.
            change: relative change of each since it was last computed, `(batch, tokens)`.
            same_rows: whether all items must keep the same tokens.
        """
        raise NotImplementedError


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
    attends_to_few: bool = True,
) -> Any:
    """Run a block on fewer image tokens and all text tokens; returns what it would with all.

    Args:
        narrowing: which tokens.
        contract: of the block.
        forward: the block's own.
        args, kwargs: its arguments.
        attends_to_few: whether its attention runs on the few, too.
    """
    streams = contract.read(args, kwargs)
    x = streams.hidden_states
    few = narrowing.narrow(x)
    given = few, x.shape[1], narrowing.rows
    args, kwargs = contract.replaced(args, kwargs, *given, attends_to_few)
    output = contract.unpack(forward(*args, **kwargs), streams)
    every = narrowing.widen(x, few, output.hidden_states)
    return contract.pack(replace(output, hidden_states=every))

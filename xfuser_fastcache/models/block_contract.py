"""How a model's transformer blocks are called: which argument is what, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from xfuser_fastcache.models.streams import ENCODER, HIDDEN, Streams


def _table_rows(whole: torch.Tensor, tokens: int, rows: torch.Tensor) -> torch.Tensor:
    """Return the text's rows of a table and the chosen ones of its last `tokens` rows."""
    text = len(whole) - tokens
    return torch.cat((whole[:text], whole[text:].index_select(0, rows[0])))


@dataclass(frozen=True)
class BlockContract:
    """One kind of block: the order of its parameters and of its results.

    Attributes:
        parameters: names of the block's forward parameters, in order.
        returns: names of the streams that it returns, in order; a block with one result returns
            the bare tensor.
        tables: names of arguments that hold tables `(text and image tokens, ...)` in any nesting of
            tuples, a row a token, the text's first, one for the whole batch.
        attention: names of the block's modules that attend to image tokens.

    Example:
        >>> joint = BlockContract(parameters=(HIDDEN, ENCODER), returns=(ENCODER, HIDDEN))
        >>> x, text = torch.zeros(1, 4, 8), torch.ones(1, 2, 8)
        >>> streams = joint.read((x,), {"encoder_hidden_states": text})
        >>> joint.unpack(joint.pack(streams)) == streams
        True
    """

    parameters: tuple[str, ...]
    returns: tuple[str, ...]
    tables: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return one of a block's arguments by its name."""
        index = self.parameters.index(name)
        return args[index] if index < len(args) else kwargs[name]

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """Return the streams among a block's arguments."""
        text = self.argument(ENCODER, args, kwargs) if ENCODER in self.returns else None
        return Streams(self.argument(HIDDEN, args, kwargs), text)

    def attention_of(self, block: nn.Module) -> dict[str, nn.Module]:
        """Return a block's modules that attend to image tokens, by name."""
        found = {name: getattr(block, name, None) for name in self.attention}
        return {name: module for name, module in found.items() if module is not None}

    def replaced(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        few: torch.Tensor,
        tokens: int,
        rows: torch.Tensor | None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a block's arguments with fewer image tokens.

        Args:
            args, kwargs: the block's.
            few: image tokens that take the place of all, `(batch, few, dim)`.
            tokens: number of all image tokens.
            rows: the place of each of the few among all, `(1, few)`; None leaves tables whole.
        """
        positional, named = list(args), dict(kwargs)

        def put(name: str, value: Any) -> None:
            index = self.parameters.index(name)
            if index < len(positional):
                positional[index] = value
            else:
                named[name] = value

        put(HIDDEN, few)
        if rows is not None:
            for name in self.tables:
                pick = partial(_table_rows, tokens=tokens, rows=rows)
                put(name, tree_map(pick, self.argument(name, args, kwargs)))
        return tuple(positional), named

    def unpack(self, output: Any) -> Streams:
        """Return the streams among a block's results."""
        if len(self.returns) == 1:
            return Streams(output)
        named = dict(zip(self.returns, output, strict=True))
        return Streams(named[HIDDEN], named[ENCODER])

    def pack(self, streams: Streams) -> Any:
        """Return streams in the form in which the block returns its results."""
        if len(self.returns) == 1:
            return streams.hidden_states
        named = {HIDDEN: streams.hidden_states, ENCODER: streams.encoder_hidden_states}
        return tuple(named[name] for name in self.returns)

"""Spans: which consecutive blocks are decided together, and which of them a rank holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """The consecutive blocks of one span that this rank holds.

    Attributes:
        span: index of the span in the whole model.
        last: local index of its last block on this rank.
        begins: whether the span's first block is among them, before which the span is measured: in
            a pipeline one stage measures it, as a single rank would.
    """

    span: int
    last: int
    begins: bool


def span_of_blocks(blocks: int, granularity: int | str) -> list[int]:
    """Return the span of each block of the whole model; no more spans than blocks.

    Example:
        >>> span_of_blocks(5, 2), span_of_blocks(3, "stack"), span_of_blocks(3, "block")
        ([0, 0, 0, 1, 1], [0, 0, 0], [0, 1, 2])
    """
    named = {"stack": 1, "block": blocks}
    spans = named[granularity] if isinstance(granularity, str) else min(granularity, blocks)
    return [index * spans // blocks for index in range(blocks)]


def pieces_of(spans: list[int], first_block: int, blocks: int) -> list[Piece]:
    """Return the piece that each block of a rank belongs to.

    Args:
        spans: span of each block of the whole model.
        first_block: index of the first block that this rank holds.
        blocks: how many it holds.

    Example:
        >>> pieces_of([0, 0, 1, 1], first_block=1, blocks=2)
        [Piece(span=0, last=0, begins=False), Piece(span=1, last=1, begins=True)]
    """
    held = spans[first_block : first_block + blocks]
    return [
        Piece(
            span,
            last=len(held) - 1 - held[::-1].index(span),
            begins=spans.index(span) >= first_block,
        )
        for span in held
    ]

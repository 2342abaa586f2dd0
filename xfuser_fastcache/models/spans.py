"""How a model's blocks are cut into spans, and which of them a rank holds."""

from __future__ import annotations

from dataclasses import dataclass


def span_of_blocks(blocks: int, granularity: int | str, first_apart: bool = False) -> list[int]:
    """Return the span of each block of the whole model; no more spans than blocks.

    Args:
        blocks: of the whole model.
        granularity: `"stack"`, `"block"`, or so many cuts.
        first_apart: whether the first block is a span of its own, which is always computed; the
            rest is cut by `granularity`.

    Example:
        >>> span_of_blocks(5, 2), span_of_blocks(3, "stack"), span_of_blocks(3, "block")
        ([0, 0, 0, 1, 1], [0, 0, 0], [0, 1, 2])
        >>> span_of_blocks(5, 2, first_apart=True)
        [0, 1, 1, 2, 2]
    """
    if first_apart:
        return [0, *(1 + span for span in span_of_blocks(blocks - 1, granularity))]
    named = {"stack": 1, "block": blocks}
    spans = named[granularity] if isinstance(granularity, str) else min(granularity, blocks)
    return [index * spans // blocks for index in range(blocks)]


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


def pieces_held(spans: list[int], first_block: int, blocks: int) -> list[Piece]:
    """Return the piece that each block of this rank belongs to.

    Args:
        spans: span of each block of the whole model.
        first_block: index of the first one that this rank holds.
        blocks: how many it holds.
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

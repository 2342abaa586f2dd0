"""The token streams that a block reads and replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

HIDDEN = "hidden_states"
ENCODER = "encoder_hidden_states"


@dataclass(frozen=True)
class Streams:
    """The token streams that a block reads and replaces.

    Attributes:
        hidden_states: image tokens, `(batch, tokens, dim)`.
        encoder_hidden_states: text tokens `(batch, text_tokens, dim)`, or None where the model's
            blocks do not replace them.
        rest: rows that stand around the image's and are none, of a condition or padding,
            `(batch, rows, dim)`; None where there are none. They are never measured or merged.
        ahead: how many of `rest`, the first ones, stand in front of the image's.
    """

    hidden_states: torch.Tensor
    encoder_hidden_states: torch.Tensor | None = None
    rest: torch.Tensor | None = None
    ahead: int = 0

    def map(self, function: Callable[..., torch.Tensor], *others: Streams) -> Streams:
        """Apply `function` stream by stream, to this and to the same stream of `others`.

        A stream that one of them lacks is left out: the last block of SD3 drops its text.
        """
        every = (self, *others)
        image = function(*(streams.hidden_states for streams in every))
        texts = [streams.encoder_hidden_states for streams in every]
        rests = [streams.rest for streams in every]
        return Streams(
            image,
            None if any(text is None for text in texts) else function(*texts),
            None if any(rest is None for rest in rests) else function(*rests),
            self.ahead,
        )

    def split(self, lengths: tuple[int, ...]) -> list[Streams]:
        """Cut the image tokens into consecutive parts; each keeps the whole text stream.

        Args:
            lengths: tokens of each part; see `cut`.
        """
        assert self.rest is None, "pipelines of patches have no rows of conditions"
        parts = cut(self.hidden_states, lengths)
        return [Streams(part, self.encoder_hidden_states) for part in parts]

    def nbytes(self) -> int:
        """Bytes that the streams occupy."""
        tensors = (self.hidden_states, self.encoder_hidden_states, self.rest)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def cut(x: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Cut a tensor along dimension 1 into parts of the lengths given.

    Where that dimension counts something else than the lengths do (rows or pixels, where they count
    tokens), they are taken in proportion.

    Example:
        >>> [len(part[0]) for part in cut(torch.zeros(1, 16, 2), (1, 3))]
        [4, 12]
    """
    whole, held = sum(lengths), x.shape[1]
    return x.split([length * held // whole for length in lengths], dim=1)

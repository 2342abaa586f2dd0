"""Which rows of a block's tensors are image, text, or neither; and how many of each there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from xfuser_fastcache.models.streams import Streams


@dataclass(frozen=True)
class TokenLayout:
    """How a block's tensors hold their tokens; "image" is a picture's or a video's.

    Behind the image's tokens may stand rows that are none: tokens of a condition, such as the
    picture that FLUX.1-Kontext edits, or padding. They run, and are skipped, with the others, but
    they are never measured, counted or merged. How many there are the forward pass tells; see
    `TokenCounts`.

    Attributes:
        token_axis: of the block's tensors.
        channel_axis: likewise; the third one is the batch.
        joined: which comes first where text and image are one tensor; None where they are two.
            Where the image does, all that stands behind it counts as text.
        text_tokens: where text comes first, the way to its number of tokens through the block's
            arguments (a parameter, then keys); empty where a block before it, which holds the two
            apart, has told.

    Example:
        >>> joint = TokenLayout(joined="text")
        >>> counts = TokenCounts()
        >>> counts.text = 2
        >>> streams = joint.apart(torch.arange(5.0).view(1, 5, 1), None, counts)
        >>> streams.encoder_hidden_states.flatten().tolist()
        [0.0, 1.0]
        >>> joint.together(streams)[0].flatten().tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """

    token_axis: int = 1
    channel_axis: int = -1
    joined: Literal["text", "image"] | None = None
    text_tokens: tuple[str, ...] = ()

    def apart(
        self,
        image: torch.Tensor,
        text: torch.Tensor | None,
        counts: TokenCounts | None,
        behind: int | None = None,
    ) -> Streams:
        """Return the streams in what a block is given or puts out, views of it.

        Args:
            image: the image's tensor, or the one that holds both.
            text: the text's, where they are two.
            counts: of this forward pass; None where all of `image` is image.
            behind: rows behind the image's, where that is known better: the block was run on fewer
                tokens than `counts` says.

        Raises:
            ValueError: the number of text tokens in a joined tensor is not known.
        """
        image = self._moved(image, (self.token_axis, self.channel_axis), (1, -1))
        if text is not None:
            text = self._moved(text, (self.token_axis, self.channel_axis), (1, -1))
        if counts is None and self.joined is None:
            return Streams(image, text)
        counts = counts or TokenCounts()
        if self.joined == "text":
            if counts.text is None:
                raise ValueError(
                    "how many tokens of a joined tensor are text is not known: no block before "
                    f"this one holds text apart, and the arguments {self.text_tokens} do not say. "
                    "Name the argument in TokenLayout.text_tokens."
                )
            text, image = image[:, : counts.text], image[:, counts.text :]
        elif text is not None:
            counts.text = text.shape[1]
        rows = image.shape[1]
        count = counts.image_of(rows) if behind is None else rows - behind
        if count == rows:
            return Streams(image, text)
        image, others = image[:, :count], image[:, count:]
        return Streams(image, others) if self.joined == "image" else Streams(image, text, others)

    def behind(self, streams: Streams) -> int:
        """Return how many rows stand behind the image's in the image's tensor."""
        others = streams.encoder_hidden_states if self.joined == "image" else streams.rest
        return 0 if others is None else others.shape[1]

    def together(self, streams: Streams) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the tensors that hold streams: the image's, or both joined, and the text's."""
        image, text, rest = streams.hidden_states, streams.encoder_hidden_states, streams.rest
        parts = [image]
        if self.joined is not None and text is not None:
            parts.insert(0 if self.joined == "text" else 1, text)
            text = None
        if rest is not None:
            parts.append(rest)
        if len(parts) > 1:
            image = torch.cat(parts, dim=1)
        axes = (1, -1), (self.token_axis, self.channel_axis)
        return self._moved(image, *axes), None if text is None else self._moved(text, *axes)

    @staticmethod
    def _moved(x: torch.Tensor, of: tuple[int, int], to: tuple[int, int]) -> torch.Tensor:
        return x if of == to else x.movedim(of, to)


@dataclass
class TokenCounts:
    """How many tokens of what the forward pass in work carries; what layouts cannot say.

    Attributes:
        count: from the arguments of the transformer's forward pass, how many tokens of the image
            stand before all that is none, over all that this forward pass carries; None for all.
        shard: place of this rank's tokens among those of the forward pass, where that cuts them
            itself; else 0.
        image: what `count` says of the forward pass in work.
        text: text tokens of this rank, where a block has been given them apart; None before.
    """

    count: Callable[[tuple[Any, ...], Mapping[str, Any]], int | None] | None = None
    shard: int = 0
    image: int | None = None
    text: int | None = None

    def open(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward pass with these arguments."""
        self.image = None if self.count is None else self.count(args, kwargs)

    def image_of(self, rows: int) -> int:
        """Return how many of this rank's rows, the first ones, are image tokens."""
        if self.image is None:
            return rows
        return min(max(self.image - self.shard * rows, 0), rows)


_leading: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def leading_zeros(ids: torch.Tensor) -> int | None:
    """Return how many tokens there are before the first whose first coordinate is not 0.

    So diffusers marks tokens of conditions in the position ids of FLUX. A pipeline hands the same
    tensor in at every step of a generation: each tensor is read once, with one wait for the device.

    Args:
        ids: position ids, `(tokens, axes)` or `(batch, tokens, axes)`, alike in the whole batch.

    Returns:
        None where there is no other token, or where others stand between those of the image.

    Example:
        >>> leading_zeros(torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0]]))
        2
    """
    if ids not in _leading:
        first = (ids[0] if ids.dim() == 3 else ids)[:, 0].cpu() != 0
        count = int(first.logical_not().sum())
        marked = 0 < count < len(first) and bool(first[count:].all())
        _leading[ids] = count if marked else None
    return _leading[ids]

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

    Around the image's tokens may stand rows that are none: tokens of a condition, such as the
    picture that FLUX.1-Kontext edits or the frame that Wan TI2V begins with, or padding. They run,
    and are skipped, with the others, but they are never measured, counted or merged. Which ones
    they are the forward pass tells; see `TokenCounts`.

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
        like: Streams | None = None,
    ) -> Streams:
        """Return the streams in what a block is given or puts out, views of it.

        Args:
            image: the image's tensor, or the one that holds both.
            text: the text's, where they are two.
            counts: of this forward pass; None where all of `image` is image.
            like: what the block was given, where that was fewer tokens than `counts` says.

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
        own = counts.image_of(rows)
        if like is not None:
            own = range(like.ahead, rows - self.behind(like))
        if len(own) == rows:
            return Streams(image, text)
        ahead, image, behind = image.tensor_split((own.start, own.stop), dim=1)
        if self.joined == "image":
            text, behind = behind, behind[:, :0]
        rests = [rows for rows in (ahead, behind) if rows.shape[1]]
        rest = torch.cat(rests, dim=1) if len(rests) > 1 else next(iter(rests), None)
        return Streams(image, text, rest, own.start)

    def behind(self, streams: Streams) -> int:
        """Return how many rows stand behind the image's in the image's tensor."""
        if self.joined == "image":
            text = streams.encoder_hidden_states
            return 0 if text is None else text.shape[1]
        return 0 if streams.rest is None else streams.rest.shape[1] - streams.ahead

    def together(self, streams: Streams) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the tensors that hold streams: the image's, or both joined, and the text's."""
        image, text, rest = streams.hidden_states, streams.encoder_hidden_states, streams.rest
        parts = [image]
        if rest is not None:
            ahead, behind = rest.tensor_split((streams.ahead,), dim=1)
            parts = [ahead, image, behind]
        if self.joined is not None and text is not None:
            parts = [text, *parts] if self.joined == "text" else [*parts, text]
            text = None
        if len(parts) > 1:
            image = torch.cat(parts, dim=1)
        axes = (1, -1), (self.token_axis, self.channel_axis)
        return self._moved(image, *axes), None if text is None else self._moved(text, *axes)

    @staticmethod
    def _moved(x: torch.Tensor, of: tuple[int, int], to: tuple[int, int]) -> torch.Tensor:
        return x if of == to else x.movedim(of, to)


@dataclass
class TokenCounts:
    """Which tokens of what the forward pass in work carries are the image's; layouts cannot say.

    Attributes:
        count: from the arguments of the transformer's forward pass, which tokens are the image's,
            of all that this forward pass carries; None for all.
        shard: place of this rank's tokens among those of the forward pass, where that cuts them
            itself; else 0.
        shards: how many ranks share them then; else 1.
        image: what `count` says of the forward pass in work.
        text: text tokens of this rank, where a block has been given them apart; None before.
        rows: of this rank, the image's among them, as a block was given them last.
    """

    count: Callable[[tuple[Any, ...], Mapping[str, Any]], range | None] | None = None
    shard: int = 0
    shards: int = 1
    image: range | None = None
    text: int | None = None
    rows: int = 0
    _counted: object = None

    def open(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], occasion: object = None
    ) -> None:
        """Begin a forward pass with these arguments.

        Args:
            args, kwargs: of the transformer's forward.
            occasion: equal for forward passes whose counts are; None to count each time, which may
                wait for the device.
        """
        if self.count is not None and (occasion is None or occasion != self._counted):
            self.image, self._counted = self.count(args, kwargs), occasion

    def image_of(self, rows: int) -> range:
        """Return which of this rank's rows are image tokens."""
        self.rows = rows
        if self.image is None:
            return range(rows)
        first = self.shard * rows
        start, stop = (
            min(max(end - first, 0), rows) for end in (self.image.start, self.image.stop)
        )
        return range(start, stop)

    @property
    def are_uneven(self) -> bool:
        """Whether ranks that share a forward pass may hold different numbers of image tokens."""
        whole = range(self.rows * self.shards)
        return self.shards > 1 and self.image not in (None, whole)

    def pixels_of(self, rows: int) -> range:
        """Return which pixels of a video's latents are noise; all ranks are given all of them.

        Args:
            rows: pixels, of which each of the image's tokens holds equally many.
        """
        if self.image is None:
            return range(rows)
        return range(self.image.start * rows // self.image.stop, rows)


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


def noisiest_rows(timestep: torch.Tensor, tokens: int) -> range | None:
    """Return the tokens of noise where each has a timestep: from the first of the noisiest on.

    Those of a picture to begin with have a lower one (Wan TI2V, LTX-2).

    Args:
        timestep: `(batch, tokens)`; one an item tells nothing of them.
        tokens: of which those behind are padding.
    """
    if timestep.dim() < 2:
        return None
    noisiest = timestep[0] == timestep[0].amax()
    return range(int(noisiest.int().argmax()), tokens)


_texts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def shared_rows(mask: torch.Tensor, tokens: int) -> range:
    """Return the rows that are image in every item, where each item's stand right behind its text.

    A mask is read once, with one wait for the device: a pipeline hands the same in at every step.

    Args:
        mask: of the texts, `(batch, text_tokens)`: 1 for each token that is there.
        tokens: of each item's image.

    Returns:
        From the end of the longest text to the end of the first image; empty where one text is
        longer than another with its image.

    Example:
        >>> shared_rows(torch.tensor([[1, 1, 1], [1, 0, 0]]), 4)
        range(3, 5)
    """
    if mask not in _texts:
        lengths = mask.sum(dim=1).tolist()
        _texts[mask] = max(lengths), min(lengths)
    longest, shortest = _texts[mask]
    return range(longest, max(longest, shortest + tokens))

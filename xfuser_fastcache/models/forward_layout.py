"""How a transformer's whole forward pass is read and replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from xfuser_fastcache.models.streams import HIDDEN, Streams
from xfuser_fastcache.models.token_layout import TokenCounts

_TENSOR = object()  # stands for a tensor in the form of a result


class Given(NamedTuple):
    """What a forward pass is given.

    Attributes:
        batch: number of items.
        sizes: of an item's latents.
        latents: the latents, or the first of them where they are a list.
    """

    batch: int
    sizes: tuple[int, ...]
    latents: torch.Tensor


@dataclass(frozen=True)
class ForwardLayout:
    """What a transformer's forward pass is given, and in which shape.

    Latents have 3 dimensions `(batch, tokens, channels)`, 4 `(batch, channels, height, width)`, or,
    of a video, 5; the noise prediction comes back in the same layout. Some models are given more
    channels than are noise, those of a mask and a condition behind them; see `ForwardContract`.

    Attributes:
        latents: the parameter that holds the latents.
        timestep: the parameter that holds the timestep: a number, one an item `(batch,)`, or one a
            token `(batch, tokens)`, of which tokens of a condition have a lower one.
        parameters: names of the forward's parameters, in order; only those that may be given by
            position are needed.
        channel_axis: of videos: 1 in `(batch, channels, frames, height, width)`, 2 where the frames
            come first.
        lists: whether latents, and the result, are a list of tensors `(channels, frames, height,
            width)`, one an item, all of one size.

    Example:
        >>> layout = ForwardLayout(parameters=("hidden_states", "timestep"))
        >>> layout.timestep_of((torch.zeros(1, 4, 8), torch.tensor([0.5])), {}).tolist()
        [0.5]
    """

    latents: str = HIDDEN
    timestep: str = "timestep"
    parameters: tuple[str, ...] = (HIDDEN,)
    channel_axis: int = 1
    lists: bool = False

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return one of the forward's arguments by its name; None where it is left out."""
        if name in kwargs or name not in self.parameters:
            return kwargs.get(name)
        index = self.parameters.index(name)
        return args[index] if index < len(args) else None

    def beside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return all arguments but latents and timestep, by name, or by position without one."""
        places = [*self.parameters[: len(args)], *map(str, range(len(self.parameters), len(args)))]
        given = {**dict(zip(places, args, strict=True)), **kwargs}
        return {k: v for k, v in given.items() if k not in (self.latents, self.timestep)}

    def latents_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return the latents with all their channels, items of a list stacked."""
        found = self.argument(self.latents, args, kwargs)
        return torch.stack(list(found)) if self.lists else found

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
        """Return the sizes of the latents; no tensor is made for it.

        Raises:
            TypeError: an item is a list of latents itself (Z-Image-Omni).
        """
        found = self.argument(self.latents, args, kwargs)
        first = found[0] if self.lists else found
        if not isinstance(first, torch.Tensor):
            raise TypeError(
                f"{self.latents} is given a list of {len(first)} latents for each item; caches "
                "take one. Call remove_cache(transformer) to draw from several pictures."
            )
        return Given(len(found), tuple(first.shape[not self.lists :]), first)

    def timestep_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return the timestep of each item, or one for all; the largest of an item's tokens."""
        found = self.argument(self.timestep, args, kwargs)
        return found.amax(dim=1) if found.dim() == 2 else found

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents as `(batch, tokens, channels)`; a pixel is a token."""
        if latents.dim() == 3:
            return latents
        if latents.dim() == 4:
            return latents.flatten(2).transpose(1, 2)
        return latents.movedim(self.channel_axis, -1).flatten(1, -2)


class ForwardContract:
    """A transformer's forward pass, as if it were one block.

    What is measured of it are the latents. Its result is taken out of whatever tuple or diffusers
    output it comes in, and put back into one of the same form: the image's tensor first, then the
    text's, which a pipeline's stage may hand on. Pictures `(batch, channels, height, width)` are
    held with their rows in dimension 1, so that patches of rows are cut as patches of tokens are;
    videos as tokens.

    Args:
        layout: of the forward pass.
        channels: of the latents that are noise, the first ones; None for all.
        counts: of the forward pass in work, for latents that are tokens or a video; None where all
            of them are noise. What it puts out for the others nobody reads: it is put back as
            zeros.
    """

    def __init__(
        self,
        layout: ForwardLayout | None = None,
        channels: int | None = None,
        counts: TokenCounts | None = None,
    ) -> None:
        self.layout = layout or ForwardLayout()
        self._channels = channels
        self._counts = counts or TokenCounts()
        # Of the last result: leaves and tree, a video's shape, and rows around the image's.
        self._form: tuple[list[Any], Any] | None = None
        self._video: torch.Size | None = None
        self._around = 0, 0

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """Return the noise among the arguments as tokens `(batch, tokens, channels)`."""
        latents = self.layout.latents_of(args, kwargs)
        tokens = self.layout.tokens(latents)
        own = self._noise_of(tokens.shape[1], latents.dim())
        if len(own) < tokens.shape[1]:
            tokens = tokens[:, own.start : own.stop]
        if self._channels is not None and self._channels < tokens.shape[2]:
            tokens = tokens[..., : self._channels]
        return Streams(tokens)

    def _noise_of(self, rows: int, dims: int) -> range:
        """Return which rows of latents of so many dimensions are noise."""
        counted = {3: self._counts.image_of, 5: self._counts.pixels_of}
        return counted[dims](rows) if dims in counted else range(rows)

    def unpack(self, output: Any) -> Streams:
        """Return the tensors in a result, and remember its form.

        Raises:
            TypeError: it holds no tensor, or more than two that are no list of items.
        """
        leaves, tree = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors or (len(tensors) > 2 and not self.layout.lists):
            raise TypeError(
                f"the transformer returned {len(tensors)} tensors in a {type(output).__name__}; "
                "forecaster='output' stands in for one, or for two (image and text). Choose "
                "another forecaster."
            )
        self._form = [_TENSOR if isinstance(x, torch.Tensor) else x for x in leaves], tree
        if self.layout.lists:
            tensors = [torch.stack(tensors)]
        image, *others = tensors
        text = others[0] if others else None
        self._video = image.shape if image.dim() == 5 else None
        if image.dim() == 4:
            return Streams(image.transpose(1, 2), text)
        tokens = self.layout.tokens(image)
        rows = tokens.shape[1]
        own = self._noise_of(rows, image.dim())
        self._around = own.start, rows - own.stop
        return Streams(tokens[:, own.start : own.stop] if any(self._around) else tokens, text)

    def pack(self, streams: Streams) -> Any:
        """Return streams in the form of the last result."""
        assert self._form is not None
        leaves, tree = self._form
        image = self._image(streams.hidden_states)
        held = image.unbind(0) if self.layout.lists else (image, streams.encoder_hidden_states)
        tensors = iter(held)
        return tree_unflatten([next(tensors) if x is _TENSOR else x for x in leaves], tree)

    def _image(self, held: torch.Tensor) -> torch.Tensor:
        """Return the image in the shape in which the transformer puts it out."""
        if held.dim() == 4:
            return held.transpose(1, 2).contiguous()
        if any(self._around):
            shapes = [(len(held), rows, held.shape[2]) for rows in self._around]
            ahead, behind = (held.new_zeros(shape) for shape in shapes)
            held = torch.cat((ahead, held, behind), dim=1)
        if self._video is not None:
            axis = self.layout.channel_axis
            sizes = [size for at, size in enumerate(self._video) if at != axis]
            return held.reshape(*sizes, held.shape[2]).movedim(-1, axis).contiguous()
        return held


def noise_tokens(image: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return the noise prediction in an output, in the layout of the latents.

    Of a span of blocks, whose image tokens are in that layout already, they are it.

    Args:
        image: the output as a contract holds it.
        latents: `(batch, tokens, channels)`.
    """
    if image.dim() == 4:
        image = image.transpose(2, 3).flatten(1, 2)
    return image[..., : latents.shape[-1]]


def noise_part(output: torch.Tensor, channels: int | None) -> torch.Tensor:
    """Return the channels of an output that hold the noise prediction: the first ones, as a view.

    Args:
        output: as a contract holds it: `(batch, tokens, channels)`, or a picture with its rows in
            dimension 1.
        channels: of the latents; None for all.
    """
    return output if channels is None else output[:, :, :channels]


def latents_known(given: Streams) -> bool:
    """Say whether latents hold any tokens: at a pipeline's last stage they may not be known."""
    return given.hidden_states.numel() > 0


def laid_out_as(latents: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return latents `(batch, tokens, channels)` in the layout of an output."""
    if output.dim() == 3:
        return latents
    batch, _, channels = latents.shape
    return latents.reshape(batch, output.shape[1], -1, channels).transpose(2, 3)

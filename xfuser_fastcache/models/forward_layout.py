"""How a transformer's whole forward pass is read and replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from xfuser_fastcache.models.streams import HIDDEN, Streams

_TENSOR = object()  # stands for a tensor in the form of a result


class ForwardContract:
    """A transformer's forward pass, as if it were one block.

    What is measured of it are the latents. Its result is taken out of whatever tuple or diffusers
    output it comes in, and put back into one of the same form: the image's tensor first, then the
    text's, which a pipeline's stage may hand on. Pictures `(batch, channels, height, width)` are
    held with their rows in dimension 1, so that patches of rows are cut as patches of tokens are.
    """

    def __init__(self) -> None:
        # Leaves and tree of the last result.
        self._form: tuple[list[Any], Any] | None = None

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """Return the latents among the arguments as tokens `(batch, tokens, channels)`."""
        x = args[0] if args else kwargs[HIDDEN]
        return Streams(x.flatten(2).transpose(1, 2) if x.dim() == 4 else x)

    def unpack(self, output: Any) -> Streams:
        """Return the tensors in a result, and remember its form.

        Raises:
            TypeError: it holds no tensor, or more than two.
        """
        leaves, tree = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if len(tensors) not in (1, 2):
            raise TypeError(
                f"the transformer returned {len(tensors)} tensors in a {type(output).__name__}; "
                "forecaster='output' stands in for one, or for two (image and text). Choose "
                "another forecaster."
            )
        self._form = [_TENSOR if isinstance(x, torch.Tensor) else x for x in leaves], tree
        image, *text = tensors
        return Streams(image.transpose(1, 2) if image.dim() == 4 else image, *text)

    def pack(self, streams: Streams) -> Any:
        """Return streams in the form of the last result."""
        assert self._form is not None
        leaves, tree = self._form
        image = streams.hidden_states
        if image.dim() == 4:
            image = image.transpose(1, 2).contiguous()
        tensors = iter((image, streams.encoder_hidden_states))
        return tree_unflatten([next(tensors) if x is _TENSOR else x for x in leaves], tree)


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

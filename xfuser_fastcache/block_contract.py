"""How a model's transformer blocks are called: which argument is what, and what comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

HIDDEN = "hidden_states"
ENCODER = "encoder_hidden_states"


@dataclass(frozen=True)
class Streams:
    """The token streams that a block reads and replaces.

    Attributes:
        hidden_states: image tokens, `(batch, tokens, dim)`.
        encoder_hidden_states: text tokens `(batch, text_tokens, dim)`, or None where the model's
            blocks do not replace them.
    """

    hidden_states: torch.Tensor
    encoder_hidden_states: torch.Tensor | None = None

    def map(self, function: Callable[..., torch.Tensor], *others: Streams) -> Streams:
        """Apply `function` stream by stream, to this and to the same stream of `others`.

        A text stream that one of them lacks is left out: the last block of SD3 drops it.
        """
        image = function(self.hidden_states, *(other.hidden_states for other in others))
        texts = [streams.encoder_hidden_states for streams in (self, *others)]
        return Streams(image, None if any(text is None for text in texts) else function(*texts))

    def split(self, lengths: tuple[int, ...]) -> list[Streams]:
        """Cut the image tokens into consecutive parts; each keeps the whole text stream.

        Args:
            lengths: tokens of each part; see `cut`.
        """
        parts = cut(self.hidden_states, lengths)
        return [Streams(part, self.encoder_hidden_states) for part in parts]

    def nbytes(self) -> int:
        """Bytes that the streams occupy."""
        tensors = (self.hidden_states, self.encoder_hidden_states)
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


@dataclass(frozen=True)
class Step:
    """One planned denoising step.

    Attributes:
        timestep: as the transformer gets it, but for rounding to the model's dtype.
        noise_level: the variable of forecasts: sigma, or what else grows evenly with the noise.
    """

    timestep: float
    noise_level: float


class ModelAdapter(ABC):
    """What the engine must know of a model family; one file a family, no state.

    Attributes:
        model_class: name of the diffusers transformer class; subclasses of it count.
        timestep_index: position of `timestep` among the parameters of the transformer's forward.
        embedder: submodule for the timestep's embedding, which every pipeline stage holds whole.
        block_lists: attribute of the transformer that holds blocks -> their contract, in the order
            in which the forward pass runs through them.
        tea_polynomial: coefficients, highest power first, that TeaCache publishes for the family:
            from relative change of the modulated input to that of the output; None where none is.
    """

    model_class: ClassVar[str]
    timestep_index: ClassVar[int]
    embedder: ClassVar[str]
    block_lists: ClassVar[Mapping[str, BlockContract]]
    tea_polynomial: ClassVar[tuple[float, ...] | None] = None

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Say whether `model` (not a wrapper around it) belongs to this family."""
        return any(base.__name__ == cls.model_class for base in type(model).__mro__)

    @classmethod
    def dim(cls, model: Any) -> int:
        """Return the width of a token inside the blocks, `hidden_states.shape[-1]`."""
        return model.inner_dim

    @classmethod
    def latent_channels(cls, model: Any) -> int:
        """Return the channels of the latents that the transformer is given."""
        return model.config.in_channels

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return what the first block's attention is given: normed, and modulated by the timestep.

        Args:
            block: the first of the model's blocks.
            args: that the block is called with.
            kwargs: likewise.

        Returns:
            Image tokens, `(batch, tokens, dim)`.
        """
        contract = next(iter(cls.block_lists.values()))
        hidden_states = contract.argument(HIDDEN, args, kwargs)
        return block.norm1(hidden_states, emb=contract.argument("temb", args, kwargs))[0]

    @classmethod
    def timestep(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return the timestep among the arguments of the transformer's forward."""
        index = cls.timestep_index
        return args[index] if index < len(args) else kwargs["timestep"]

    @classmethod
    @abstractmethod
    def noise_level(cls, timestep: float) -> float:
        """Return the noise level (sigma) that belongs to a timestep as the transformer gets it."""

    @classmethod
    @abstractmethod
    def plan(cls, scheduler: Any) -> list[Step]:
        """Return the steps that `scheduler.timesteps` plans, in full precision."""

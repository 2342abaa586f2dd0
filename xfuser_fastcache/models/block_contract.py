"""How a model's transformer blocks are called: which argument is what, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map

from xfuser_fastcache.models.signatures import metadata_of, parameters_of
from xfuser_fastcache.models.streams import ENCODER, HIDDEN, Streams
from xfuser_fastcache.models.token_layout import TokenCounts, TokenLayout
from xfuser_fastcache.models.wrappers import unwrapped


@dataclass(frozen=True)
class Table:
    """An argument of a block with a row a token, in any nesting of tuples.

    Its rows are the image's, or the text's too, alike for the whole batch but for a mask's.

    Attributes:
        name: of the parameter.
        axis: of the tensors that counts tokens.
        part: which entry of a tuple holds the image's table, where the text has one of its own.
        dims: dimensions that its tensors have where they hold a row a token; None for always. Wan's
            `temb` has 4 with a timestep a token, else 3.
        attended: whether it is for the block's attention, as positions are, which may run on all
            tokens where the rest of the block does not.
        text: where the text's rows stand, if it has any.
    """

    name: str
    axis: int = 0
    part: int | None = None
    dims: int | None = None
    attended: bool = True
    text: Literal["ahead", "behind"] = "ahead"

    def narrowed(self, value: Any, tokens: int, behind: int, rows: torch.Tensor) -> Any:
        """Return the table with the chosen of the image's rows, and all others.

        Args:
            value: the argument.
            tokens: image tokens that it has rows for.
            behind: rows behind the image's.
            rows: the chosen ones, `(rows,)`.
        """
        if value is None:
            return None
        pick = partial(self._picked, tokens=tokens, behind=behind, rows=rows)
        if self.part is None:
            return tree_map(pick, value)
        narrowed = tree_map(pick, value[self.part])
        return (*value[: self.part], narrowed, *value[self.part + 1 :])

    def _picked(self, x: Any, tokens: int, behind: int, rows: torch.Tensor) -> Any:
        if not isinstance(x, torch.Tensor) or self.dims not in (None, x.dim()):
            return x
        before = x.shape[self.axis] - tokens - behind
        text, image, others = x.split((before, tokens, behind), dim=self.axis)
        return torch.cat((text, image.index_select(self.axis, rows), others), dim=self.axis)


@dataclass(frozen=True)
class BlockContract:
    """One kind of block: what its parameters are, and what it returns.

    What is left out the block's own code says: see `of`.

    Attributes:
        parameters: names of the block's forward parameters, in order.
        returns: the streams that it returns, in order, as `HIDDEN` and `ENCODER`; a block with one
            result returns the bare tensor.
        tables: arguments with a row a token; a bare name stands for `Table(name)`.
        attention: names of the block's modules that attend to image tokens.
        layout: of its tensors.
        hidden: the parameter that holds the image's tokens.
        encoder: the one that holds the text's.
        counts: of the forward pass in work; None where a block's image tensor is all image.

    Example:
        >>> joint = BlockContract(parameters=(HIDDEN, ENCODER), returns=(ENCODER, HIDDEN))
        >>> x, text = torch.zeros(1, 4, 8), torch.ones(1, 2, 8)
        >>> streams = joint.read((x,), {"encoder_hidden_states": text})
        >>> joint.unpack(joint.pack(streams)) == streams
        True
    """

    parameters: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    tables: tuple[str | Table, ...] = ()
    attention: tuple[str, ...] = ()
    layout: TokenLayout = TokenLayout()
    hidden: str = HIDDEN
    encoder: str = ENCODER
    counts: TokenCounts | None = field(default=None, compare=False, repr=False)

    def of(self, block: nn.Module, counts: TokenCounts | None = None) -> BlockContract:
        """Return this contract with what a block's code says.

        Parameters come from its forward's signature; what it returns, and under which names it
        takes its streams, from diffusers' `TransformerBlockRegistry`. What is stated here stands.

        Args:
            block: one of the kind.
            counts: of the forward pass.

        Raises:
            ValueError: nothing says what the block returns.
        """
        kind: Any = type(unwrapped(block))
        known, returns = metadata_of(kind), self.returns
        hidden, encoder = self.hidden, self.encoder
        if known is not None:
            if self.hidden == HIDDEN:
                hidden = known.hidden_states_argument_name
            if self.encoder == ENCODER:
                # diffusers before 0.41 knows no other name.
                encoder = getattr(known, "encoder_hidden_states_argument_name", ENCODER)
            places = {
                HIDDEN: known.return_hidden_states_index,
                ENCODER: known.return_encoder_hidden_states_index,
            }
            found = {place: name for name, place in places.items() if place is not None}
            returns = returns or tuple(found[place] for place in sorted(found))
        if not returns:
            raise ValueError(
                f"what {kind.__name__} returns is not known: diffusers' registry of blocks "
                "has none of that name. State it: BlockContract(returns=('hidden_states',))."
            )
        return replace(
            self,
            parameters=self.parameters or parameters_of(kind),
            returns=returns,
            hidden=hidden,
            encoder=encoder,
            counts=counts,
        )

    def _parameter(self, name: str) -> str:
        """Return the block's name of a stream's parameter; of others, the name itself."""
        return {HIDDEN: self.hidden, ENCODER: self.encoder}.get(name, name)

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return one of a block's arguments by its name; None where it is left out."""
        name = self._parameter(name)
        index = self.parameters.index(name)
        return args[index] if index < len(args) else kwargs.get(name)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """Return the streams among a block's arguments."""
        self._note_text(args, kwargs)
        text = self.argument(ENCODER, args, kwargs) if ENCODER in self.returns else None
        return self.layout.apart(self.argument(HIDDEN, args, kwargs), text, self.counts)

    def _note_text(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the number of text tokens, where an argument of the block says it."""
        if not self.layout.text_tokens or self.counts is None:
            return
        name, *keys = self.layout.text_tokens
        found = self.argument(name, args, kwargs)
        for key in keys:
            found = None if found is None else found.get(key)
        if found is not None:
            self.counts.text = int(found)

    def image_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the image's rows of a tensor in the layout of the block's image tensor."""
        return self.layout.apart(x, None, self.counts).hidden_states

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
        attends_to_few: bool = True,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a block's arguments with fewer image tokens.

        Args:
            args, kwargs: the block's.
            few: image tokens that take the place of all, `(batch, few, dim)`.
            tokens: number of all image tokens.
            rows: the place of each of the few among all, `(1, few)`; None leaves tables whole.
            attends_to_few: whether tables of attention are narrowed, too.
        """
        positional, named = list(args), dict(kwargs)

        def put(name: str, value: Any) -> None:
            index = self.parameters.index(name)
            if index < len(positional):
                positional[index] = value
            else:
                named[name] = value

        streams = self.read(args, kwargs)
        put(self.hidden, self.layout.together(replace(streams, hidden_states=few))[0])
        if rows is not None:
            rest, text = self.layout.behind(streams), streams.encoder_hidden_states
            for table in self.tables:
                table = Table(table) if isinstance(table, str) else table
                if table.attended and not attends_to_few:
                    continue
                whole = self.argument(table.name, args, kwargs)
                behind = rest
                if table.text == "behind" and text is not None:
                    behind += text.shape[1]
                put(table.name, table.narrowed(whole, tokens, behind, rows[0]))
        return tuple(positional), named

    def unpack(self, output: Any, like: Streams | None = None) -> Streams:
        """Return the streams among a block's results.

        Args:
            output: what it returned.
            like: what it was given, where it was run on fewer tokens; see `TokenLayout.apart`.
        """
        if len(self.returns) == 1:
            return self.layout.apart(output, None, self.counts, like)
        named = dict(zip(self.returns, output, strict=True))
        return self.layout.apart(named[HIDDEN], named[ENCODER], self.counts, like)

    def pack(self, streams: Streams) -> Any:
        """Return streams in the form in which the block returns its results."""
        image, text = self.layout.together(streams)
        return image if len(self.returns) == 1 else self._ordered(image, text)

    def handed_on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what the block would if it put out what it is given; nothing is copied.

        Most of a skipped step's blocks do this and no more, so nothing is looked up here.
        """
        given = len(args)
        found = tuple(
            [args[i] if i < given else kwargs.get(name) for i, name in self._returned_parameters]
        )
        return found[0] if len(found) == 1 else found

    @cached_property
    def _returned_parameters(self) -> list[tuple[int, str]]:
        """Place and name of the parameters that hold what is returned, in the order of that."""
        names = [self._parameter(name) for name in self.returns]
        return [(self.parameters.index(name), name) for name in names]

    def _ordered(self, image: torch.Tensor, text: torch.Tensor | None) -> tuple[Any, ...]:
        named = {HIDDEN: image, ENCODER: text}
        return tuple(named[name] for name in self.returns)

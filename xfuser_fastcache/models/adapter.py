"""What the engine must know of a model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import diffusers
import torch
from torch import nn

from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import ForwardContract, ForwardLayout
from xfuser_fastcache.models.noise import NoiseLevels, Step
from xfuser_fastcache.models.signatures import parameters_of
from xfuser_fastcache.models.streams import HIDDEN
from xfuser_fastcache.models.token_layout import TokenCounts

__all__ = ["ModelAdapter", "Step"]


class ModelAdapter:
    """What the engine must know of a model family; one file a family, no state.

    Attributes:
        model_class: name of the diffusers transformer class; subclasses of it count.
        embedder: submodule for the timestep's embedding, which every pipeline stage holds whole.
        block_lists: attribute of the transformer that holds blocks -> their contract, in the order
            in which the forward pass runs through them.
        forward: what the forward pass is given.
        noise: how its timesteps stand for noise.
        tea_polynomial: coefficients, highest power first, that TeaCache publishes for the family:
            from relative change of the modulated input to that of the output; None where none is.
        forecaster: what stands in under `Fast`, where nothing else is asked for; None for what that
            brings.
        narrows: whether blocks can run on some of their tokens: attention aside, they look at each
            alone, and are given nothing with a row a token that `tables` do not name.
        long_skips: whether a later block takes what an earlier one has put out, too: then all
            blocks are skipped together.
        counts_each_pass: whether forward passes of one size differ in which tokens are the
            image's, so that `image_tokens` is asked at each; it must not wait for the device then.
        branches_apart: whether, where ranks share guidance, one may call its transformer at a step
            and the other not: then ranks decide with those of their branch alone.
        guided_whole: whether xDiT's ranks share no guidance under CFG parallelism: each of them
            runs both branches.
    """

    model_class: ClassVar[str]
    embedder: ClassVar[str]
    block_lists: ClassVar[Mapping[str, BlockContract]]
    forward: ClassVar[ForwardLayout] = ForwardLayout()
    noise: ClassVar[NoiseLevels]
    tea_polynomial: ClassVar[tuple[float, ...] | None] = None
    forecaster: ClassVar[str | None] = None
    narrows: ClassVar[bool] = True
    long_skips: ClassVar[bool] = False
    counts_each_pass: ClassVar[bool] = False
    branches_apart: ClassVar[bool] = False
    guided_whole: ClassVar[bool] = False

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Say whether `model` (not a wrapper around it) belongs to this family."""
        return any(base.__name__ == cls.model_class for base in type(model).__mro__)

    # ---- sizes -------------------------------------------------------------------------------

    @classmethod
    def dim(cls, model: Any) -> int:
        """Return the width of a token inside the blocks, `hidden_states.shape[-1]`."""
        found = getattr(model, "inner_dim", None)
        if found is None:
            found = model.config.num_attention_heads * model.config.attention_head_dim
        return found

    @classmethod
    def noise_channels(cls, model: Any) -> int:
        """Return how many channels of the latents, the first ones, are noise.

        A model is given more where a mask and a condition come with the noise (FLUX Fill, Wan I2V),
        and puts out more where it predicts variances too (PixArt). All are noise where its config
        names none that come out.
        """
        given, made = model.config.in_channels, getattr(model.config, "out_channels", None)
        return given if made is None else min(given, made)

    @classmethod
    def image_tokens(
        cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> range | None:
        """Return which tokens are the image's, and not a condition's or padding; None for all.

        It is asked once for all forward passes that one plan of a scheduler has for one size; see
        `counts_each_pass`.

        Args:
            model: that is called.
            args: of the transformer's forward.
            kwargs: likewise.
        """
        return None

    @classmethod
    def latent_tokens(
        cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> range | None:
        """Return which of the latents that the forward pass is given are noise; None for all.

        They are the image's tokens, unless the blocks are given others than the forward pass.
        """
        return cls.image_tokens(model, args, kwargs)

    # ---- what is read ------------------------------------------------------------------------

    @classmethod
    def forward_layout(cls) -> ForwardLayout:
        """Return `forward` with the order of parameters that the class in diffusers has."""
        return _with_parameters(cls.forward, getattr(diffusers, cls.model_class, None))

    @classmethod
    def timestep(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return the timestep among the arguments of the transformer's forward."""
        return cls.forward_layout().timestep_of(args, kwargs)

    @classmethod
    def forward_contract(cls, model: Any, counts: TokenCounts) -> ForwardContract:
        """Return the contract of a transformer's whole forward pass."""
        return ForwardContract(cls.forward_layout(), cls.noise_channels(model), counts)

    @classmethod
    def contracts(cls, model: Any, counts: TokenCounts | None = None) -> list[BlockContract]:
        """Return the contract of each block that a model holds, in order.

        Args:
            model: whose blocks they are.
            counts: of its forward pass; None where all of a block's image tensor is image.
        """
        return [
            contract.of(block, counts)
            for name, contract in cls.block_lists.items()
            for block in getattr(model, name)
        ]

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
            Of all rows of the block's image tensor, `(batch, tokens, dim)`.
        """
        contract = cls.first_contract(block)
        hidden_states = contract.argument(HIDDEN, args, kwargs)
        return block.norm1(hidden_states, emb=contract.argument("temb", args, kwargs))[0]

    @classmethod
    def tea_input(
        cls, contract: BlockContract, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return what TeaCache's rule for the family measures from step to step.

        Args:
            contract: of the block, in the forward pass in work.
            block: the first of the model's blocks.
            args: that the block is called with.
            kwargs: likewise.

        Returns:
            The modulated input of image tokens, `(batch, tokens, dim)`; a family may say else.
        """
        return contract.image_of(cls.modulated_input(block, args, kwargs))

    @classmethod
    def tea_polynomial_of(cls, model: Any) -> tuple[float, ...] | None:
        """Return the polynomial that TeaCache publishes for a model; None where none is."""
        return cls.tea_polynomial

    @classmethod
    def first_contract(cls, block: nn.Module) -> BlockContract:
        """Return the contract of the first of the model's blocks."""
        return next(iter(cls.block_lists.values())).of(block)

    # ---- time --------------------------------------------------------------------------------

    @classmethod
    def noise_level(cls, timestep: float) -> float:
        """Return the noise level (sigma) that belongs to a timestep as the transformer gets it."""
        return cls.noise.level(timestep)

    @classmethod
    def plan(cls, scheduler: Any) -> list[Step]:
        """Return the steps that `scheduler.timesteps` plans, in full precision."""
        return cls.noise.plan(scheduler)


@cache
def _with_parameters(layout: ForwardLayout, model_class: Any) -> ForwardLayout:
    if model_class is None:
        return layout
    return replace(layout, parameters=parameters_of(model_class))

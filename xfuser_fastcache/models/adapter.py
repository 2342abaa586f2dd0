"""What the engine must know of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.streams import HIDDEN


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

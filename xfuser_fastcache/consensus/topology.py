"""Where this rank stands: who decides with it, which blocks it holds, which tokens it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist
from torch import nn

from xfuser_fastcache.models.wrappers import unwrapped

if TYPE_CHECKING:
    from xfuser_fastcache.consensus.collective import Consensus


@dataclass(frozen=True)
class DecisionGroup:
    """The ranks that together run one forward pass of the transformer.

    Attributes:
        ranks: global ranks, in group order.
        rank: this process's global rank.
        stage: this rank's pipeline stage, from 0.
        stages: number of pipeline stages.
        counts_tokens: False where another rank measures the very same tokens and counts them:
            tensor-parallel replicas, and in front of a forward pass that cuts its inputs by itself.
        shard: place of this rank's tokens among those that the forward pass is given, where it cuts
            them by itself and they are measured within; else 0.
        shards: how many ranks share them then; else 1.
        branch: where guidance is parallel, 0 on ranks that run the batch without guidance, 1 on
            those that run it with; None where a forward pass carries all there is.
        device_group: process group to use with `sync_backend="nccl"`; None without one.
        whole_inputs: whether a forward pass is given the same on all ranks, but for its latents;
            False where the pipeline has cut it.
        cuts_tokens: whether a forward pass cuts the tokens that it is given by itself, so that its
            latents are the same as well.
        replica: global ranks that draw one picture with this one, in group order; empty where all
            do. More than they decide together where replicas share weights by FSDP.
    """

    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    stage: int = 0
    stages: int = 1
    counts_tokens: bool = True
    shard: int = 0
    shards: int = 1
    branch: int | None = None
    device_group: Any = None
    whole_inputs: bool = True
    cuts_tokens: bool = False
    replica: tuple[int, ...] = ()

    @property
    def together(self) -> tuple[int, ...]:
        """Global ranks that draw one picture, this one among them."""
        return self.replica or self.ranks

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank puts out the noise prediction: also where there is one stage."""
        return self.stage == self.stages - 1


@dataclass(frozen=True)
class Position:
    """Which tokens the current forward pass of this rank carries.

    Attributes:
        patch: index of the PipeFusion patch; 0 outside patch mode.
        patch_tokens: image tokens of each patch on this rank; empty without PipeFusion.
        patched: whether this forward carries one patch rather than all tokens.
    """

    patch: int = 0
    patch_tokens: tuple[int, ...] = ()
    patched: bool = False

    @property
    def is_last_patch(self) -> bool:
        """Whether the step is complete on this rank after this forward."""
        return not self.patched or self.patch == len(self.patch_tokens) - 1


class PatchKeys(Protocol):
    """What a patch of PipeFusion attends to of the others, at computed steps behind a gap."""

    def open(self, step: int, level: float) -> None:
        """Begin a forward pass.

        Args:
            step: of the generation, from 0.
            level: its sigma.
        """

    def close(self) -> bool:
        """End a forward pass, also one that has failed; say whether any keys and values in it were
        carried on. May be called twice."""

    def forget(self) -> None:
        """Forget what is remembered of the generation."""

    def nbytes(self) -> int:
        """Bytes held."""


class NoPatchKeys:
    """No patches, or keys and values as old as they are."""

    def open(self, step: int, level: float) -> None:
        """Nothing to do."""

    def close(self) -> bool:
        """Nothing is carried on."""
        return False

    def forget(self) -> None:
        """Nothing to do."""

    def nbytes(self) -> int:
        """None."""
        return 0


class Layout(Protocol):
    """How ranks share a forward pass; an object of it is made for one transformer.

    Registered under the entry point group `xfuser_fastcache.layouts`; the first one that recognises
    a transformer serves it, else `PlainLayout`.
    """

    @classmethod
    def recognises(cls, transformer: nn.Module) -> bool:
        """Say whether this process runs that transformer in this layout; imports nothing heavy."""

    def model_of(self, transformer: nn.Module) -> nn.Module:
        """Return the diffusers model inside a wrapper, or the transformer itself."""

    def decision_group(
        self, transformer: nn.Module | None = None, whole_forward: bool = False
    ) -> DecisionGroup:
        """Return the ranks that decide together, and this rank's place among them.

        Args:
            transformer: that is cached.
            whole_forward: whether it is measured in front of its forward pass, else at its blocks.

        Raises:
            ValueError: this rank takes no part.
        """

    def position(self) -> Position:
        """Return which tokens the forward pass that has just begun carries."""

    def patch_keys(self, slope: float) -> PatchKeys:
        """Return what a patch attends to of the others.

        Args:
            slope: how much of their last slope keys and values follow over skipped steps, 0 to 1.
        """

    def follow(self, consensus: Consensus) -> None:
        """Bound the waits of the model's own communication as those of a cache that is put on, and
        make its channels anew where the ranks have met after a failure (`consensus.renewed`).
        """


class PlainLayout:
    """No xDiT: a single process, or ranks of plain torch.distributed that share a forward pass.

    Args:
        process_group: ranks that run the same forward together; None means all ranks of the
            default group where one is initialised, this process alone elsewhere.
    """

    def __init__(self, process_group: Any = None):
        self.process_group = process_group

    @classmethod
    def recognises(cls, transformer: nn.Module) -> bool:
        """Any module; layouts that know more are asked first."""
        return True

    def model_of(self, transformer: nn.Module) -> nn.Module:
        """Return the diffusers model: itself, or what torch has put a wrapper around."""
        return unwrapped(transformer)

    def decision_group(
        self, transformer: nn.Module | None = None, whole_forward: bool = False
    ) -> DecisionGroup:
        """Return the ranks that decide together.

        Args:
            transformer: that is cached.
            whole_forward: whether it is measured in front of its forward pass, else at its blocks.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return DecisionGroup()
        ranks = tuple(dist.get_process_group_ranks(self.process_group or dist.group.WORLD))
        if dist.get_rank() not in ranks:
            raise ValueError(
                f"rank {dist.get_rank()} is not in the given process group {list(ranks)}. Pass the "
                "group of the ranks that run this forward pass together."
            )
        place, places = _context_parallel(transformer)
        return DecisionGroup(
            ranks,
            dist.get_rank(),
            counts_tokens=not whole_forward or place == 0,
            shard=0 if whole_forward else place,
            shards=1 if whole_forward else places,
            device_group=self.process_group or dist.group.WORLD,
        )

    def position(self) -> Position:
        """Return which tokens this forward carries: all of the rank's."""
        return Position()

    def patch_keys(self, slope: float) -> PatchKeys:
        """Return nothing to attend to: there are no patches."""
        return NoPatchKeys()

    def follow(self, consensus: Consensus) -> None:
        """Nothing to do: this layout knows no communication of the model's own."""


def _context_parallel(transformer: nn.Module | None) -> tuple[int, int]:
    """Return this rank's place, and of how many, where diffusers' context parallelism cuts the
    tokens; else 0 of 1.

    Its hooks cut what the transformer is given, beneath those of the cache.
    """
    config = getattr(transformer, "_parallel_config", None)
    parallel = getattr(config, "context_parallel_config", None)
    mesh = getattr(parallel, "_flattened_mesh", None)
    return (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())

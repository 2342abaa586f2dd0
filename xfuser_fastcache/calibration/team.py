"""Who makes a calibration: one process, or the ranks of an xDiT layout that draw together.

Recorders see what the transformer of this rank is given and puts out. A team puts the parts
together as one rank would have them, shares prompts out over data-parallel replicas, and lets the
first rank alone fit and write, so that a file does not depend on the layout but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xfuser_fastcache.artifacts.calibration import WITHOUT_STAGES
from xfuser_fastcache.xdit.ranks import (
    Place,
    all_ranks,
    data_replica,
    meet_all,
    patch_now,
    pipeline_in_words,
    place_of,
    ranks_of_replica,
)

T = TypeVar("T")
S = TypeVar("S")
# Longest wait for other ranks, such as for a fit of the first one; in seconds.
LIMIT_S = 3600.0


class Team:
    """One process that holds the whole model.

    Attributes:
        place: of this rank.
        replicas: that share the prompts out.
        layout: what records depend on: PipeFusion's stages and patches.
        first: whether this rank writes files and shows what goes on.
    """

    place = Place()
    replicas = 1
    layout = WITHOUT_STAGES
    first = True

    def agreed(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first rank, on every rank; so with its errors."""
        return make()

    def of_all(self, mine: T) -> list[tuple[Place, T]]:
        """Return what every rank gives, with its place."""
        return [(self.place, mine)]

    def of_replica(self, mine: T) -> list[tuple[Place, T]]:
        """Return what every rank of this replica gives, with its place."""
        return [(self.place, mine)]

    def shares(self, count: int) -> list[range]:
        """Return which of a batch of pictures each replica draws, as xfuser shares them out.

        Raises:
            ValueError: a replica would have none.
        """
        most = -(-count // self.replicas)
        if most * (self.replicas - 1) >= count:
            raise ValueError(
                f"a batch of {count} pictures leaves some of {self.replicas} data-parallel "
                f"replicas without any: give --batch_size and --num_prompts a multiple of "
                f"{self.replicas}"
            )
        return [range(start, min(start + most, count)) for start in range(0, count, most)]

    def shared_out(self, items: Sequence[S], draw: Callable[[S], T]) -> Iterator[T]:
        """Yield what `draw` returns for each item, in their order; each replica draws its own.

        All ranks of a replica call it together, for one item after the other.
        """
        for start in range(0, len(items), self.replicas):
            mine = start + self.place.replica
            made = [draw(item) for item in items[mine : mine + 1]]
            drawn = {place.replica: found for place, found in self.of_all(made)}
            for replica in sorted(drawn):
                yield from drawn[replica]

    def whole(self, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return tokens `(batch, tokens, channels)` as one rank has them, by replica.

        All ranks give as many tensors, at the same step of a batch that they share.
        """
        return self._assembled(self.of_all([one.float().cpu() for one in tensors]))

    def of_picture(self, tensors: Sequence[torch.Tensor], stage: int) -> list[torch.Tensor]:
        """Return tokens of this replica's picture, as `whole` does; those that a stage has."""
        parts = self.of_replica(list(tensors))
        return self._assembled([part for part in parts if part[0].stage == stage])[0]

    def patch(self) -> tuple[int, int]:
        """Return which of PipeFusion's patches is at work, and of how many."""
        return 0, 1

    def summed(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of what the ranks of this replica give."""
        parts = self.of_replica(mine)
        return np.sum([one for _, one in parts], axis=0)

    @staticmethod
    def _assembled(parts: list[tuple[Place, list[torch.Tensor]]]) -> list[list[torch.Tensor]]:
        found = []
        for replica in sorted({place.replica for place, _ in parts}):
            held = {
                (place.branch, place.shard): tensors
                for place, tensors in parts
                if place.replica == replica
            }
            branches = [
                [torch.cat(shards, dim=1) for shards in zip(*of_branch, strict=True)]
                for branch in sorted({branch for branch, _ in held})
                for of_branch in [[held[at] for at in sorted(held) if at[0] == branch]]
            ]
            found.append([torch.cat(both) for both in zip(*branches, strict=True)])
        return found

    def drawn(self, latents: torch.Tensor | None, shared: bool) -> torch.Tensor:
        """Return the latents that replicas have drawn, of which some ranks alone have them.

        Args:
            latents: of this rank; None where another rank of its replica has them.
            shared: whether replicas have shared a batch out; else each draws its own.
        """
        mine = None if latents is None else latents.cpu()
        parts = self.of_all(mine) if shared else self.of_replica(mine)
        found = {place.replica: one for place, one in parts if one is not None}
        return torch.cat([found[replica] for replica in sorted(found)])


class Alone(Team):
    """One process: nothing is sent, nothing leaves its device."""

    def whole(self, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return the tokens themselves."""
        return [[one.float() for one in tensors]]

    def drawn(self, latents: torch.Tensor | None, shared: bool) -> torch.Tensor:
        """Return the latents themselves."""
        assert latents is not None
        return latents


class Ranks(Team):
    """The ranks of an xDiT layout that is set up, each with its part.

    Args:
        transformer: of xfuser's.
        limit_s: longest wait for other ranks, in seconds.
    """

    def __init__(self, transformer: nn.Module, limit_s: float = LIMIT_S):
        self.place = place_of(transformer)
        if self.place.stages > 1:
            self.layout = pipeline_in_words()
        self.limit_s = limit_s
        self.replicas = data_replica()[1]
        self.first = torch.distributed.get_rank() == 0

    def agreed(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first rank, on every rank; so with its errors.

        Raises:
            TimeoutError: ranks did not come within the limit.
        """
        made: tuple[Any, Exception | None] = None, None
        if self.first:
            try:
                made = make(), None
            except Exception as error:
                made = None, error
        found, wrong = self.of_all(made)[0][1]
        if wrong is not None:
            raise wrong
        return found

    def patch(self) -> tuple[int, int]:
        """Return which of PipeFusion's patches is at work, and of how many."""
        return patch_now() if self.place.stages > 1 else (0, 1)

    def of_all(self, mine: T) -> list[tuple[Place, T]]:
        """Return what every rank gives; a collective call, as all others are."""
        meet_all(self.limit_s)
        return all_ranks((self.place, mine))

    def of_replica(self, mine: T) -> list[tuple[Place, T]]:
        """Return what every rank of this replica gives."""
        return ranks_of_replica((self.place, mine), self.limit_s)

"""Keys and values of PipeFusion's other patches, carried on over the steps that were skipped.

A patch attends to keys and values that xDiT remembers of the others: this step's of the patches
before it, the last step's of those after it. Behind a gap they are as old as the gap. Here they
follow their last slope in sigma as far as uncached ones would have come. What xDiT remembers stays
as it is.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch


class _When(NamedTuple):
    """A step at which keys and values are computed, or are to be.

    Attributes:
        step: from 0.
        level: its sigma.
    """

    step: int
    level: float


class _Patch:
    """One patch in one attention layer, whose newest keys and values xDiT remembers.

    Args:
        newest: when these were computed.

    Attributes:
        before: when the ones before them were; None where there are none.
        older: the ones before them, keys and values side by side.
    """

    def __init__(self, newest: _When):
        self.newest = newest
        self.before: _When | None = None
        self.older = torch.empty(0)

    def renew(self, now: _When, replaced: torch.Tensor) -> None:
        """Note that newer ones take the place of `replaced`."""
        self.older = replaced.clone()
        self.newest, self.before = now, self.newest

    def carried(self, newest: torch.Tensor, due: _When | None, slope: float) -> torch.Tensor | None:
        """Return them as of the step at which they are due; None where they are as new as that, or
        where nothing like them came before.

        Args:
            newest: as xDiT remembers them.
            due: when they should have been computed.
            slope: how much of their last slope they follow.
        """
        last, before = self.newest, self.before
        if due is None or before is None or last.step >= due.step or last.level == before.level:
            return None
        if self.older.shape != newest.shape:
            return None
        way = (due.level - last.level) / (last.level - before.level)
        return torch.lerp(self.older, newest, 1 + slope * way)


class CarriedKeys:
    """Stands in front of xDiT's cache of keys and values while a forward pass runs.

    Args:
        slope: how much of their last slope keys and values follow, 0 to 1.
    """

    def __init__(self, slope: float):
        self.slope = slope
        self._now: _When | None = None
        self._last: _When | None = None
        self._carries = False
        self._layers: weakref.WeakKeyDictionary[Any, list[_Patch]] = weakref.WeakKeyDictionary()

    def open(self, step: int, level: float) -> None:
        """Begin a forward pass; see `PatchKeys`."""
        if self._now is None or self._now.step != step:
            self._now, self._last = _When(step, level), self._now
        self._carries = False
        vars(_manager())["update_and_get_kv_cache"] = self._update

    def close(self) -> bool:
        """End a forward pass; see `PatchKeys`."""
        vars(_manager()).pop("update_and_get_kv_cache", None)
        return self._carries

    def forget(self) -> None:
        """Forget all; see `PatchKeys`."""
        self._layers.clear()
        self._now = self._last = None

    def nbytes(self) -> int:
        """Bytes held: of each layer as many as xDiT remembers of it."""
        return sum(patch.older.nbytes for layer in self._layers.values() for patch in layer)

    @torch.compiler.disable
    def _update(
        self, new_kv: Any, layer: Any, slice_dim: int = 1, layer_type: str = "attn", **kwargs: Any
    ) -> Any:
        """Stand for `CacheManager.update_and_get_kv_cache`, which xDiT's attention calls."""
        from xfuser.core.distributed import get_runtime_state

        manager, state, now = _manager(), get_runtime_state(), self._now
        assert now is not None
        held, own = manager.cache[layer_type, layer], state.pipeline_patch_idx
        lengths = state.pp_patches_token_num
        arguments = manager, new_kv, layer, slice_dim, layer_type
        if len(lengths) == 1:  # there are no others, and xDiT may keep text beside it
            return type(manager).update_and_get_kv_cache(*arguments, **kwargs)
        patches = self._layers.setdefault(layer, [_Patch(now) for _ in lengths])
        if now != patches[own].newest:  # else it is the first pass, or runs again
            remembered = _cut(held.tensors[0], slice_dim, lengths)
            for i, patch in enumerate(patches):
                if i == own or not state.patch_mode:
                    patch.renew(now, remembered[i])
        found = type(manager).update_and_get_kv_cache(*arguments, **kwargs)
        if not state.patch_mode:
            return found
        parts = list(_cut(held.tensors[0], slice_dim, lengths))
        carries = False
        for i, patch in enumerate(patches):
            due = now if i < own else self._last
            carried = None if i == own else patch.carried(parts[i], due, self.slope)
            if carried is not None:
                parts[i], carries = carried, True
        if not carries:
            return found
        self._carries = True
        whole = torch.cat(parts, dim=slice_dim)
        return torch.chunk(whole, 2, dim=-1) if isinstance(new_kv, list) else whole


def _manager() -> Any:
    from xfuser.core.cache_manager.cache_manager import get_cache_manager

    return get_cache_manager()


def _cut(held: torch.Tensor, dim: int, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """Cut what xDiT remembers of a layer into patches.

    Under Ulysses a rank attends to the tokens of all ranks, those of a patch in a row.
    """
    ranks = held.shape[dim] // sum(lengths)
    return held.split([ranks * length for length in lengths], dim=dim)

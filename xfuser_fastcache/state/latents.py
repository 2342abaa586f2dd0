"""The latents at the last stage of a pipeline, where only the scheduler is given them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.models.streams import Streams, cut
from xfuser_fastcache.state.local import WHOLE, LocalState, patch_of


class StageLatents:
    """Sees at a scheduler's step which latents a patch has had, and which it has next.

    A later stage is given hidden states in place of latents, and the last one steps with what it
    puts out. So after each of its forward passes the scheduler's next `step` is listened to, once:
    till then the instance has a `step` of its own, and afterwards none again. Where nobody steps,
    or with other shapes, no latents are known, and forecasts do without them.

    Args:
        tokens: lays latents out as `(batch, tokens, channels)`.
        scheduler: returns the one that the pipeline steps with now, or None.
    """

    def __init__(
        self, tokens: Callable[[torch.Tensor], torch.Tensor], scheduler: Callable[[], Any]
    ):
        self._tokens = tokens
        self._scheduler = scheduler
        # Patch, or `WHOLE`, -> latents of the coming step, `(pictures, tokens, channels)`.
        self._next: dict[int, torch.Tensor] = {}
        self._listens_to: Any = None

    def given(self, streams: Streams, position: Position) -> Streams:
        """Return what this step's latents are, in the batch of what the stage was given.

        Without any tokens where they are not known.
        """
        if position.patched and WHOLE in self._next:
            self._next = dict(enumerate(cut(self._next[WHOLE], position.patch_tokens)))
        return _in_batch(self._next.get(patch_of(position)), streams.hidden_states)

    def listen(self, local: LocalState, position: Position) -> None:
        """Take the latents from the scheduler's next step.

        Args:
            local: of the branch whose forward pass has ended; an anchor of it that lacks its
                latents is completed.
            position: of that pass.
        """
        self.ignore()
        scheduler = self._scheduler()
        if scheduler is None:
            return
        step = scheduler.step
        self._listens_to = scheduler, vars(scheduler).get("step")

        @functools.wraps(step)
        def listened(*args: Any, **kwargs: Any) -> Any:
            self.ignore()
            found = step(*args, **kwargs)
            sample = inspect.signature(step).bind(*args, **kwargs).arguments.get("sample")
            if isinstance(sample, torch.Tensor):
                self._next[patch_of(position)] = self._tokens(found[0])
                local.complete(position, functools.partial(_in_batch, self._tokens(sample)))
            return found

        vars(scheduler)["step"] = listened

    def ignore(self) -> None:
        """Give the scheduler its own step back."""
        if self._listens_to is None:
            return
        (scheduler, before), self._listens_to = self._listens_to, None
        if before is None:
            vars(scheduler).pop("step", None)
        else:
            vars(scheduler)["step"] = before

    def forget(self) -> None:
        """Forget what is remembered of the generation."""
        self.ignore()
        self._next.clear()

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(latents.nbytes for latents in self._next.values())


def _in_batch(latents: torch.Tensor | None, like: torch.Tensor) -> Streams:
    """Return latents repeated as guidance does it, or none where they do not fit."""
    if latents is None or len(like) % len(latents):
        return Streams(like.new_empty(len(like), 0, 0))
    return Streams(latents.repeat(len(like) // len(latents), 1, 1))

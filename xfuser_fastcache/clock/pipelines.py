"""Which pipelines own a transformer, and which of their schedulers plans its steps now."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

# In order; no pipeline is kept alive by it.
_pipelines: weakref.WeakKeyDictionary[DiffusionPipeline, None] = weakref.WeakKeyDictionary()


def watch_pipelines() -> None:
    """Know every pipeline that there is, and those to come; calling again changes nothing.

    Those that are made later pass `DiffusionPipeline.register_modules`; those that were made before
    are searched for once.
    """
    register = DiffusionPipeline.register_modules
    if register.__module__ == __name__:
        return

    @functools.wraps(register)
    def register_and_note(self: DiffusionPipeline, **modules: Any) -> None:
        register(self, **modules)
        _pipelines[self] = None

    register_and_note.__module__ = __name__
    DiffusionPipeline.register_modules = register_and_note
    for thing in gc.get_objects():
        if issubclass(type(thing), DiffusionPipeline):
            _pipelines[thing] = None


def owners_of(transformer: nn.Module) -> list[DiffusionPipeline]:
    """Return the pipelines that hold this very module, in the order in which they came to be."""
    return [p for p in _pipelines if any(held is transformer for held in vars(p).values())]


class PresentScheduler:
    """The scheduler that plans a transformer's steps now.

    A pipeline's scheduler may be exchanged while a cache is on, and two pipelines may share a
    transformer; so each time all of them are asked, and the one that has planned last is it. One
    that has planned nothing plans no steps.

    Args:
        transformer: that the pipelines call; held weakly.
        given: a scheduler that the user has named; it counts like those of the pipelines.
    """

    def __init__(self, transformer: nn.Module, given: Any = None):
        self._transformer = weakref.ref(transformer)
        self._given = given
        self._chosen: Any = None
        # Scheduler -> its timesteps when it was last looked at.
        self._seen: dict[int, torch.Tensor] = {}

    def __call__(self) -> Any:
        """Return it; None where nobody has planned anything."""
        known = self._known()
        fresh = [s for key, s in known.items() if self._seen.get(key) is not s.timesteps]
        # Of several that were never looked at, one that has not begun is about to.
        fresh.sort(key=lambda s: getattr(s, "step_index", None) is not None)
        if fresh:
            self._chosen = fresh[0]
        elif self._chosen is not None and id(self._chosen) not in known:
            self._chosen = next(iter(known.values()), None)
        self._seen = {key: s.timesteps for key, s in known.items()}
        return self._chosen

    def pass_over(self) -> None:
        """A call was refused: what its pipeline has planned is not for the one at work."""
        self._seen = {key: s.timesteps for key, s in self._known().items()}

    def _known(self) -> dict[int, Any]:
        transformer = self._transformer()
        owners = [] if transformer is None else owners_of(transformer)
        found = [getattr(pipe, "scheduler", None) for pipe in owners]
        return {id(s): s for s in (*found, self._given) if _has_planned(s)}


def _has_planned(scheduler: Any) -> bool:
    # Some are born with the timesteps of their training, which are no plan.
    planned = getattr(scheduler, "num_inference_steps", None) is not None
    return planned and getattr(scheduler, "timesteps", None) is not None

"""Which branch of guidance a call of the transformer belongs to, for recorders."""

from __future__ import annotations

from typing import Any

from torch import nn

from xfuser_fastcache.clock.clock import Reader
from xfuser_fastcache.clock.pipelines import PresentScheduler, watch_pipelines
from xfuser_fastcache.clock.timeline import Timeline
from xfuser_fastcache.consensus.topology import PlainLayout
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.token_layout import TokenCounts


class BranchCounter:
    """Tells branches as a cache does, by the clock.

    Args:
        transformer: whose forward the pipeline calls.
        adapter: of its family.
    """

    def __init__(self, transformer: nn.Module, adapter: type[ModelAdapter]):
        watch_pipelines()
        scheduler = PresentScheduler(transformer)
        self._reader = Reader(adapter, TokenCounts(), scheduler, PlainLayout())
        self.reset()

    def reset(self) -> None:
        """Begin a generation."""
        self._timeline = Timeline()

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return the branch of a call of the transformer by its arguments; 0 opens a step."""
        return self._timeline.open(self._reader.arrival(args, kwargs)).branch

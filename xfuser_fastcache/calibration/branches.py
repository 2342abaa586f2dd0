"""Which branch of guidance a call of the transformer belongs to, for recorders."""

from __future__ import annotations

from typing import Any

from xfuser_fastcache.models.adapter import ModelAdapter


class BranchCounter:
    """Counts the calls of a step: those with the same timestep, one after another, are branches.

    Args:
        adapter: of the model's family.
    """

    def __init__(self, adapter: type[ModelAdapter]):
        self.adapter = adapter
        self.reset()

    def reset(self) -> None:
        """Begin a generation."""
        self._timestep: float | None = None
        self._branch = 0

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return the branch of a call of the transformer by its arguments; 0 opens a step."""
        timestep = float(self.adapter.timestep(args, kwargs).flatten()[0])
        self._branch = self._branch + 1 if timestep == self._timestep else 0
        self._timestep = timestep
        return self._branch

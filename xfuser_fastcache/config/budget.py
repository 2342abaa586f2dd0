"""How many steps of a generation are computed, in the words in which users say it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xfuser_fastcache.config.checks import shown

if TYPE_CHECKING:
    from xfuser_fastcache.config.cache_config import CacheConfig

# Share of steps that is computed. The names are those of cache-dit's masks of steps, and so are the
# shares: its masks for 28 steps compute 18, 15, 11 and 8 of them.
QUALITIES = {"slow": 18 / 28, "medium": 15 / 28, "fast": 11 / 28, "ultra": 8 / 28}
# A quality of ours: `medium` from so many steps on. Of fewer a skip costs more than a step left out
# (docs/decisions/few-steps.md), so that all are computed.
AUTO, AUTO_STEPS = "auto", 10
BUDGETS = ("computed_steps", "speedup", "quality")
_SAYING = ("gate", "steps_mask", "calibration", "num_warmup_steps", "max_consecutive_skips")


@dataclass(frozen=True)
class Budget:
    """A number of computed steps, by one of the options of `BUDGETS`.

    Attributes:
        option: its name.
        value: as it was given.

    Example:
        >>> [Budget(*given).of(28) for given in
        ...     (("computed_steps", 7), ("speedup", 2.5), ("quality", "ultra"))]
        [7, 11, 8]
    """

    option: str
    value: int | float | str

    @property
    def share(self) -> float | None:
        """Share of steps that is computed; None where their number is given."""
        if isinstance(self.value, str):
            return QUALITIES["medium" if self.value == AUTO else self.value]
        return 1 / self.value if self.option == "speedup" else None

    def of(self, steps: int) -> int:
        """Return how many of so many steps are computed, at least 1."""
        if self.share is None:
            found = int(self.value)
        elif self.value == AUTO and steps < AUTO_STEPS:
            found = steps
        elif isinstance(self.value, str):
            found = round(self.share * steps)
        else:
            found = math.floor(steps / self.value)
        return min(max(found, 1), steps)

    def __str__(self) -> str:
        return f"{self.option}={shown(self.value)}"


def given_budget(config: CacheConfig) -> Budget | None:
    """Return the budget that a config asks for, or None."""
    given = {name: getattr(config, name) for name in BUDGETS}
    return next((Budget(k, v) for k, v in given.items() if v is not None), None)


def says_which_steps(config: CacheConfig) -> bool:
    """Say whether any option but a budget says which steps are computed, or asks for the gate."""
    given = any(getattr(config, name) is not None for name in _SAYING)
    given = given or bool(config.given_of("gate")) or config.granularity != "stack"
    return given or not config.enable_block_approx or config.shadow_audit > 0


def never_skips(config: CacheConfig) -> bool:
    """Whether a threshold of 0 forbids every skip, whatever else is asked for."""
    thresholds = [getattr(gate, "cache_ratio_threshold", None) for gate in config.methods.gates]
    return all(threshold == 0 for threshold in thresholds)

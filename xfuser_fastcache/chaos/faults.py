"""Random worlds: which model runs on which ranks, and what goes wrong there."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from diffusers_adapters.tiny import TINY_MODELS
from xfuser_fastcache.chaos.families import LAYOUTS, STEPS

# Longest wait for another rank, and how long a rank is stopped: below it and beyond it.
LIMIT_S = 4.0
STOPPED_S = {"stopped below the limit": 1.0, "stopped beyond the limit": LIMIT_S + 3.0}

# How often a layout of two ranks is drawn for each larger one, and one of the families that nearly
# all layouts run for each other one.
_OFTEN_2 = 5
_OFTEN_FAMILIES = 3
_EVERYWHERE = ("flux", "sd3", "pixart")

# What another rank cannot know of: each replica of a data-parallel layout may do it on its own.
_OF_ONE_REPLICA = (
    "NaN",
    "infinity",
    "killed",
    "stopped below the limit",
    "stopped beyond the limit",
    "exception in a callback on one rank",
    "exception in a callback on all ranks",
    "exception in a block",
    "cache applied twice",
    "slow rank",
)
_BATCH = "other batch"
FAULTS = (
    *_OF_ONE_REPLICA,
    "other config",
    "other mask",
    "other steps",
    "other size",
    _BATCH,
    "other embeddings",
    "other seed",
    "cache removed",
)
# With these a picture is drawn although nothing is as it was: its ranks must agree, no more.
REDRAWN = ("NaN", "infinity")
# What only a comparison of inputs can see.
HIDDEN = ("other embeddings", "other seed")


_OFTEN: dict[str, Any] = {"use_cache": "Fast", "cache_ratio_threshold": 12.0}
CACHES: tuple[dict[str, Any], ...] = (
    _OFTEN,
    {**_OFTEN, "granularity": 2},
    {"use_cache": "Fast", "steps_mask": [1, 1, 0, 1, 0, 1, 0, 1]},
    {"use_cache": "TaylorSeer", "cache_interval": 3, "num_warmup_steps": 2},
    {"use_cache": "Fast", "cache_ratio_threshold": 0.0},
)


@dataclass(frozen=True)
class World:
    """One world and its fault, all drawn from a seed.

    Attributes:
        seed: of it.
        family: a name of `TINY_MODELS`.
        layout: a name of `families.LAYOUTS`.
        fault: one of `FAULTS`.
        rank: on which it happens.
        step: at which it happens, where it happens during a generation.
        block: in front of which of those that the rank holds, as a share of them.
        options: of the cache.
    """

    seed: int
    family: str
    layout: str
    fault: str
    rank: int
    step: int
    block: float
    options: dict[str, Any]

    @classmethod
    def of(cls, seed: int) -> World:
        """Draw a world."""
        draw = random.Random(seed)
        weights = [_OFTEN_2 if ranks == 2 else 1 for ranks, _, _ in LAYOUTS.values()]
        layout = draw.choices(list(LAYOUTS), weights)[0]
        ranks, flags, families = LAYOUTS[layout]
        family = draw.choices(
            families, [_OFTEN_FAMILIES if f in _EVERYWHERE else 1 for f in families]
        )[0]
        alone = "data_parallel_degree" in flags
        faults = _OF_ONE_REPLICA if alone else FAULTS
        fault = draw.choice([f for f in faults if f != _BATCH or not TINY_MODELS[family].alone])
        options = draw.choice(CACHES)
        verify = fault in HIDDEN or draw.random() < 0.5
        return cls(
            seed=seed,
            family=family,
            layout=layout,
            fault=fault,
            rank=draw.randrange(ranks),
            step=draw.randrange(STEPS),
            block=draw.random(),
            options={**options, "verify_consensus": verify, "sync_timeout_s": LIMIT_S},
        )

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return LAYOUTS[self.layout][0]

    @property
    def flags(self) -> dict[str, Any]:
        """Fields of `xFuserArgs`."""
        return LAYOUTS[self.layout][1]

    def __str__(self) -> str:
        cache = self.options["use_cache"]
        return (
            f"{self.family}, {self.layout}, {cache}, {self.fault} on rank {self.rank} at step "
            f"{self.step}"
        )

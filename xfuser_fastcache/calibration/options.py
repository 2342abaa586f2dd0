"""What is asked of the generations that are recorded, and of a calibration made from them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

Options = TypeVar("Options", bound="RunOptions")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a pipeline is run.

    Attributes:
        model: a diffusers folder or hub name.
        num_inference_steps: of each generation.
        seed: of the noise; generation i draws from 1000 seed + i.
        call: further arguments of the pipeline's call; None for those in the model's folder.
        dtype: see `dtype_of`.
        max_tokens: that are recorded of a picture.
    """

    model: str
    num_inference_steps: int = 28
    seed: int = 0
    call: dict[str, Any] | None = None
    dtype: str | None = None
    max_tokens: int = 4096


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(RunOptions):
    """What a calibration is for.

    Attributes:
        output: the file to write; records are kept beside it.
        cache_ratio_threshold: epsilon, the relative error of the output from which on a skip does
            harm.
        significance_level: shares of harmful skips that are allowed, a scale each.
        max_lag: largest gap looked at, in steps.
        computed_steps: of the masks that are searched.
        moves: masks tried around each best one.
        start_from: a calibration whose masks the search is to better; None for none.
        batch_size: pictures that masks are fitted and tried on at once.
    """

    output: Path
    cache_ratio_threshold: float = 0.05
    significance_level: list[float] = field(default_factory=lambda: [0.05])
    max_lag: int = 10
    computed_steps: list[int] = field(default_factory=list)
    moves: int = 32
    start_from: Path | None = None
    batch_size: int = 40


def options_of(kind: type[Options], flags: argparse.Namespace) -> Options:
    """Return the options that flags of the same names hold; others keep their defaults."""
    names = [known.name for known in fields(kind) if hasattr(flags, known.name)]
    return kind(**{name: getattr(flags, name) for name in names})

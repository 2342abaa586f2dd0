"""Methods that pass every check and fail later, and how a service comes to know them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from xfuser_fastcache.config.checks import integer, option, text
from xfuser_fastcache.forecasters.reuse import ReuseForecaster
from xfuser_fastcache.gates.base import Evidence, Verdict
from xfuser_fastcache.gates.interval import IntervalGate
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Memory

ANY_RANK = 99
MESSAGE = "a planted error"


@dataclass(frozen=True)
class FailingGate(IntervalGate):
    """Raises where it is asked, on one rank or on all."""

    rank: int = option(ANY_RANK, integer(0), "that fails")
    table: str = option("", text("path"), "of a file that it would read")

    def judge(self, evidence: Evidence, state: Any = None) -> Verdict:
        """Fail."""
        if self.rank in (ANY_RANK, dist.get_rank()):
            raise RuntimeError(MESSAGE)
        return super().judge(evidence, state)


@dataclass(frozen=True)
class NotANumber(ReuseForecaster):
    """Forecasts NaN."""

    def forecast(self, memory: Memory, inputs: Streams, noise_level: float) -> Streams:
        """Return NaN everywhere."""
        return inputs.map(lambda stream: stream * float("nan"))


def register_in(folder: Path) -> str:
    """Lay out a package's metadata in a folder; return the PYTHONPATH with which it is found."""
    info = folder / "failing_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: failing-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[xfuser_fastcache.gates]\nFailing = {__name__}:FailingGate\n"
        f"[xfuser_fastcache.forecasters]\nnan = {__name__}:NotANumber\n"
    )
    tests = Path(__file__).resolve().parent.parent
    return os.pathsep.join(
        filter(None, (str(folder), str(tests), os.environ.get("PYTHONPATH", "")))
    )

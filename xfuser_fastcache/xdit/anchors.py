"""What a cache's anchors take on a rank, by forecaster: from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import torch

from xfuser_fastcache.artifacts.calibration import TrajectoryCorrection
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.measurements.moments import Reference
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.plugins import BUILT_IN, FORECASTERS
from xfuser_fastcache.state.local import Anchor, Memory
from xfuser_fastcache.xdit.families import FAMILIES, Example

RANKS = (1, 8, 64)
_CALIBRATED = "output with a calibration's mask"
# Wan's sizes of 81 frames: 832 x 480 and 1280 x 720 pixels.
_SIZES = {"480p": (16, 21, 60, 104), "720p": (16, 21, 90, 160)}
_WIDTHS = {"1.3B": 1536, "14B": 5120}


def bytes_held(
    forecaster: Forecaster,
    example: Example,
    ranks: int = 1,
    branches: int = 2,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Return the bytes that the stack's anchors take on one rank, once there are all of them.

    Args:
        forecaster: that the cache has.
        example: the model at its size.
        ranks: of sequence parallelism, of which each holds its share of the blocks' tokens, and all
            latents of the whole forward pass, which xDiT's runner gathers.
        branches: of guidance that the rank runs.
        dtype: of hidden states and latents.
    """
    shape = (1, -(-example.tokens // ranks), example.width)
    if forecaster.whole_forward:
        shape = (1, prod(example.latents[1:]), example.latents[0])
    memory = Memory()
    for step in range(forecaster.depth + 1):
        inputs, outputs = (Streams(torch.empty(shape, dtype=dtype, device="meta")) for _ in "xy")
        anchor = Anchor(
            noise_level=1.0 - 0.1 * step,
            inputs=inputs,
            residual=forecaster.kept(inputs, outputs),
            reference=Reference.of(inputs.hidden_states),
        )
        memory = forecaster.update(memory, anchor)
    return branches * memory.nbytes()


def forecasters() -> dict[str, Forecaster]:
    """Return those of the package by name, and the output forecast with a mask's corrections."""
    found: dict[str, Forecaster] = {
        name: FORECASTERS[name]() for name in sorted(BUILT_IN[FORECASTERS.group])
    }
    correction = TrajectoryCorrection([1], np.zeros((1, 5), np.float32))
    return found | {_CALIBRATED: OutputForecaster(correction=correction)}


def wan_table() -> str:
    """Return what Wan 2.1 and 2.2 hold on a rank, both branches of guidance, as Markdown.

    A column for forecasters that hold as much, in megabytes.
    """
    (wan,) = (family.example for family in FAMILIES if family.adapter == "wan")
    assert wan is not None
    rows = {
        (model, size, ranks): {
            name: f"{bytes_held(one, replace(wan, latents=latents, width=width), ranks) / 1e6:,.0f}"
            for name, one in forecasters().items()
        }
        for model, width in _WIDTHS.items()
        for size, latents in _SIZES.items()
        for ranks in RANKS
    }
    columns: dict[tuple[str, ...], list[str]] = {}
    for name in forecasters():
        columns.setdefault(tuple(held[name] for held in rows.values()), []).append(f"`{name}`")
    lines = [["model", "size", "ranks", *(", ".join(names) for names in columns.values())]]
    lines.append(["---"] * len(lines[0]))
    lines += [[*map(str, at), *(held[row] for held in columns)] for row, at in enumerate(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

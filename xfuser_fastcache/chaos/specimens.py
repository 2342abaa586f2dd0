"""A small model, and files that were made for it: what options and files are tried on."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from xfuser_fastcache.artifacts.calibration import Fitted, fingerprint
from xfuser_fastcache.artifacts.linear_map import LinearMap, SpanMaps
from xfuser_fastcache.artifacts.linear_maps import MAPPED, FittedMaps
from xfuser_fastcache.assembly import adapter_of, blocks_held
from xfuser_fastcache.benchmarks.gpu.families import FAMILIES
from xfuser_fastcache.benchmarks.gpu.subject import Subject

STEPS = 6
MASK = [1, 0, 1, 0, 0, 1]


@cache
def subject() -> Subject:
    """Return FLUX in some thousand random weights, which denoises in `STEPS` steps on the CPU."""
    return Subject("flux", FAMILIES["flux"], torch.device("cpu"), small=True, steps=STEPS)


@cache
def made_for() -> dict[str, str]:
    """Return what files are bound to that were made for the small model."""
    model = subject().model
    adapter = adapter_of(model)
    blocks = sum(map(len, blocks_held(model, adapter).values()))
    return fingerprint(model, adapter.model_class, adapter.embedder, blocks)


def calibration() -> Fitted:
    """Return a calibration that predicts the change as the error, with corrections for a mask."""
    made = subject()
    made.plan()
    levels = made.scheduler.sigmas[:STEPS].double().numpy()
    cells = (STEPS, 3, 4)
    return Fitted(
        noise_levels=levels,
        weights=np.full((*cells, 4), 1e-3, np.float32),
        slopes=np.ones(cells),
        degrees=np.full(cells, 10.0),
        exponents=(1.0, 0.0),
        upper=1.5,
        scales={0.05: 1.0, 0.1: 2.0},
        masks={sum(MASK): list(MASK)},
        steering=np.full((1, STEPS, 5), 1e-3, np.float32),
        steering_guided=np.zeros((0, STEPS, 2, 5), np.float32),
        metadata={**made_for(), "cache_ratio_threshold": 0.3},
    )


def maps() -> FittedMaps:
    """Return linear maps that correct by a little."""
    width = subject().shape.width
    held = SpanMaps((0.2, 0.6), (LinearMap(diagonal=torch.full((width,), 0.1)), None), (None, None))
    return FittedMaps(dict.fromkeys(MAPPED, held), {**made_for()})

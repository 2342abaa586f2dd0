"""Hand-made calibrations and records, for tests that need no run of scripts/calibrate.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.artifacts.calibration import Fitted, fingerprint
from xfuser_fastcache.calibration.record import Trajectory


def even_levels(steps: int) -> NDArray[np.float64]:
    """Return noise levels that fall evenly from 1, as the tiny pipelines' schedulers plan them."""
    return np.linspace(1.0, 1.0 / steps, steps)


def fitted_on(levels: Any, lags: int = 3, **changes: Any) -> Fitted:
    """Return a calibration that corrects nothing and predicts the change as the error."""
    levels = np.asarray(levels, dtype=np.float64)
    cells = (len(levels), lags, lags + 1)
    tables = {
        "noise_levels": levels,
        "weights": np.zeros((*cells, 4), np.float32),
        "slopes": np.ones(cells),
        "degrees": np.full(cells, 10.0),
        "exponents": (1.0, 0.0),
        "upper": 1.0,
        "scales": {0.05: 1.0, 0.1: 2.0},
        "masks": {},
        "steering": np.zeros((0, len(levels), 5), np.float32),
        "steering_guided": np.zeros((0, len(levels), 2, 5), np.float32),
        "metadata": {"cache_ratio_threshold": 0.3},
        "digest": "0123456789abcdef",
    }
    return Fitted(**{**tables, **changes})


def fitted_for(pipe: Any, steps: int, lags: int = 3, levels: Any = None, **changes: Any) -> Fitted:
    """Return the same for a pipeline and its transformer; its noise falls evenly by default."""
    model = pipe.transformer
    adapter = adapter_of(model)
    blocks = sum(len(getattr(model, name)) for name in adapter.block_lists)
    found = fingerprint(model, adapter.model_class, adapter.embedder, blocks)
    metadata = {**found, "cache_ratio_threshold": 0.3, **changes.pop("metadata", {})}
    levels = even_levels(steps) if levels is None else levels
    return fitted_on(levels, lags, metadata=metadata, **changes)


def trajectory(
    outputs: NDArray[np.float64], latents: NDArray[np.float64], **changes: Any
) -> Trajectory:
    """Return the record of outputs and latents `(T, numbers)`; nothing was skipped."""
    rows = np.concatenate((outputs, latents))
    steps = len(outputs)
    still = {"skipped": np.zeros(steps, bool), "errors": np.zeros(steps)}
    return Trajectory(gram=rows @ rows.T / rows.shape[1], **{**still, **changes})


def smooth(
    seed: int, steps: int = 8, numbers: int = 40
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return outputs and latents `(T, numbers)` that follow random smooth curves of the noise.

    Each seed has a pace of its own, as each picture has.
    """
    rng = np.random.default_rng(seed)
    powers = even_levels(steps)[:, None] ** np.arange(4)
    pace = rng.lognormal(0.0, 0.5, 2)[:, None] * [0.0, 1.0, 0.4, 0.4] + [1.0, 0.0, 0.0, 0.0]
    outputs, latents = powers @ (pace[..., None] * rng.normal(size=(2, 4, numbers)))
    return outputs, latents

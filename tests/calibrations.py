"""Hand-made calibrations and records, for tests that need no run of scripts/calibrate.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.calibration.record import Trajectory
from xfuser_fastcache.fitted import Fitted, fingerprint


def even_levels(steps: int) -> NDArray[np.float64]:
    """Return noise levels that fall evenly from 1, as the tiny pipelines' schedulers plan them."""
    return np.linspace(1.0, 1.0 / steps, steps)


def fitted_on(levels: Any, lags: int = 3, **changes: Any) -> Fitted:
    """Return a calibration that corrects nothing and has slope 1 in every cell."""
    levels = np.asarray(levels, dtype=np.float64)
    cells = (len(levels), lags, lags + 1)
    tables = {
        "noise_levels": levels,
        "weights": np.zeros((*cells, 4), np.float32),
        "weights_blind": np.zeros((*cells, 2), np.float32),
        "slopes": np.ones(cells),
        "degrees": np.full(cells, 10.0),
        "scales": {0.05: 1.0, 0.1: 2.0},
        "masks": {},
        "metadata": {"cache_ratio_threshold": 0.3},
    }
    return Fitted(**{**tables, **changes})


def fitted_for(pipe: Any, steps: int, lags: int = 3, **changes: Any) -> Fitted:
    """Return the same for a pipeline with evenly falling noise, and for its transformer."""
    model = pipe.transformer
    adapter = adapter_of(model)
    blocks = sum(len(getattr(model, name)) for name in adapter.block_lists)
    found = fingerprint(model, adapter.model_class, adapter.embedder, blocks)
    metadata = {**found, "cache_ratio_threshold": 0.3, **changes.pop("metadata", {})}
    return fitted_on(even_levels(steps), lags, metadata=metadata, **changes)


def trajectory(
    outputs: NDArray[np.float64], latents: NDArray[np.float64], **changes: Any
) -> Trajectory:
    """Return the record of outputs and latents `(T, numbers)`; nothing was skipped."""
    rows = np.concatenate((outputs, latents))
    steps = len(outputs)
    still = {"skipped": np.zeros(steps, bool), "errors": np.zeros(steps)}
    return Trajectory(gram=rows @ rows.T, **{**still, **changes})


def smooth(
    seed: int, steps: int = 8, numbers: int = 40, bend: float = 0.4
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return outputs and latents `(T, numbers)` that follow random smooth curves of the noise."""
    rng = np.random.default_rng(seed)
    levels = even_levels(steps)[:, None]
    powers = np.concatenate((np.ones_like(levels), levels, bend * levels**2, bend * levels**3), 1)
    return powers @ rng.normal(size=(4, numbers)), powers @ rng.normal(size=(4, numbers))

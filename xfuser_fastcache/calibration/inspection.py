"""What a calibration file holds: for people as tables and a picture, for programs as JSON."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from xfuser_fastcache.artifacts.calibration import MODEL_KEYS, Fitted
from xfuser_fastcache.artifacts.linear_maps import STREAMS, FittedMaps
from xfuser_fastcache.reports.views import save_png

# The columns of `Fitted.steering`.
WEIGHTS = ("output's change", "latents' change", "output", "latents", "output's change before")
# Skips in a row whose predicted errors are drawn.
LAGS = (1, 2, 3, 5)


def inspected(fitted: Fitted) -> dict[str, Any]:
    """Return what a calibration is for, what it covers and what it promises.

    Returns:
        `made_for` names the model; `made_with` the runs; `covers` the plan, its noise levels from
        the first to the last, skips in a row and the share of cells (step, lag, spacing of anchors)
        that were seen; `gate` its threshold and lambda by alpha; `masks` by computed steps the mask
        and whether corrections of its own stand with it.
    """
    levels = fitted.noise_levels
    return {
        "kind": "calibration",
        "digest": fitted.digest,
        **_made(fitted.metadata),
        "covers": {
            "steps": len(levels),
            "noise_levels": [float(levels[0]), float(levels[-1])],
            "skips_in_a_row": fitted.most_skips,
            "cells_seen": float(np.isfinite(fitted.slopes).mean()),
        },
        "gate": {
            "cache_ratio_threshold": fitted.metadata["cache_ratio_threshold"],
            "lambda_of_alpha": {str(alpha): scale for alpha, scale in fitted.scales.items()},
        },
        "masks": {
            str(count): {
                "mask": mask,
                "corrected": fitted.trajectory_correction(mask) is not None,
                "longest_gap": max(map(len, "".join(map(str, mask)).split("1"))),
            }
            for count, mask in sorted(fitted.masks.items())
        },
    }


def inspected_maps(fitted: FittedMaps) -> dict[str, Any]:
    """Return what a file of linear maps is for, and which maps it holds.

    Returns:
        `maps` has for each forecaster the upper edges of its buckets of noise levels, and for each
        stream the number of buckets that have a map.
    """
    return {
        "kind": "linear_maps",
        "digest": fitted.digest,
        **_made(fitted.metadata),
        "maps": {
            name: {
                "edges": [float(edge) for edge in maps.edges],
                **{s: sum(m is not None for m in getattr(maps, s)) for s in STREAMS},
            }
            for name, maps in fitted.of.items()
        },
    }


def _made(metadata: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in sorted(metadata.items()) if k not in MODEL_KEYS}
    return {
        "made_for": {key: metadata.get(key) for key in MODEL_KEYS},
        "made_with": rest,
    }


def print_inspected(found: dict[str, Any], name: str, console: Console) -> None:
    """Print what `inspected` or `inspected_maps` returned.

    Args:
        found: what a file holds.
        name: of the file.
        console: is printed to.
    """
    table = Table("", "", title=f"{found['kind'].replace('_', ' ')} {name}", show_header=False)
    table.add_row("digest", found["digest"])
    for part in ("made_for", "made_with", "covers", "gate", "maps"):
        for key, value in found.get(part, {}).items():
            table.add_row(f"{part.replace('_', ' ')}: {key.replace('_', ' ')}", _shown(value))
    console.print(table)
    if not found.get("masks"):
        return
    masks = Table("computed", "steps, # computed and . skipped", "longest gap", "corrections")
    for count, mask in found["masks"].items():
        drawn = "".join("#" if computed else "." for computed in mask["mask"])
        own = "its own" if mask["corrected"] else "the cells'"
        masks.add_row(count, drawn, str(mask["longest_gap"]), own)
    console.print(masks)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items())
    if isinstance(value, list):
        return " to ".join(map(_shown, value)) if len(value) == 2 else ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save_plot(
    fitted: Fitted, path: str | os.PathLike[str], computed_steps: int | None = None
) -> None:
    """Draw masks, the corrections of one mask and predicted errors over the noise level.

    Args:
        fitted: the calibration.
        path: PNG to write.
        computed_steps: of the mask whose corrections are drawn; the middle one by default.

    Raises:
        ValueError: there is no mask of so many steps.
    """
    from matplotlib.figure import Figure

    counts = sorted(fitted.masks)
    if computed_steps is not None and computed_steps not in counts:
        raise ValueError(f"computed_steps={computed_steps}; the file has masks of {counts} steps")
    figure = Figure(figsize=(8, 9), layout="constrained")
    of_masks, of_weights, of_errors = figure.subplots(3, 1, sharex=True)
    levels = fitted.noise_levels
    for count in counts:
        at = levels[np.array(fitted.masks[count], bool)]
        of_masks.plot(at, [count] * len(at), "o", color="#0072B2", markersize=4)
    of_masks.set_ylabel("computed steps of the mask")
    if counts:
        count = counts[len(counts) // 2] if computed_steps is None else computed_steps
        correction = fitted.trajectory_correction(fitted.masks[count])
        # Without any for a mask, each skip takes that of its cell: here of the first skip.
        weights = fitted.weights[:, 0, 1] if correction is None else correction.weights
        for name, column in zip(WEIGHTS, weights.T, strict=False):
            of_weights.plot(levels, column, label=name)
        of_weights.legend(fontsize=7)
        of_weights.set_ylabel(f"weights, {count} computed")
    for lag in LAGS:
        if lag <= fitted.most_skips:
            # Anchors as far apart as the forecast reaches; gaps where nothing was seen.
            slopes = fitted.slopes[:, lag - 1, lag]
            seen = np.where(np.isfinite(slopes) & (slopes > 0), slopes, np.nan)
            of_errors.plot(levels, seen, ".-", label=f"{lag} in a row")
    of_errors.set_yscale("log")
    of_errors.legend(fontsize=7, title="skips")
    of_errors.set_ylabel("relative error by unit change")
    of_errors.set_xlabel("noise level, from the first step on")
    of_errors.invert_xaxis()
    save_png(figure, path)

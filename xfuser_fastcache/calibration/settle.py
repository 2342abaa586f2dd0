"""Makes a calibration: records, fits, searches masks, and settles the gate's scales."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from xfuser_fastcache.artifacts.calibration import VERSION, WITHOUT_STAGES, Fitted
from xfuser_fastcache.calibration import build
from xfuser_fastcache.calibration.masks import MaskTrials, given_masks
from xfuser_fastcache.calibration.options import CalibrationOptions
from xfuser_fastcache.calibration.runs import Runs, saved
from xfuser_fastcache.calibration.stages import StagedTrials
from xfuser_fastcache.reports.progress import Progress


def prepare_folder(options: CalibrationOptions, prompts: list[str], layout: str) -> Path:
    """Make the folder of records beside the output, or check that it holds the same run.

    Raises:
        ValueError: it holds records of another run.
    """
    folder = options.output.with_suffix(".records")
    folder.mkdir(parents=True, exist_ok=True)
    names = ("model", "seed", "num_inference_steps", "call", "dtype", "max_tokens")
    wanted: dict[str, Any] = {name: getattr(options, name) for name in names}
    wanted |= {"prompts": prompts, "version": VERSION, "layout": layout}
    settings = folder / "settings.json"
    if settings.exists():
        found = json.loads(settings.read_text())
        found.setdefault("layout", WITHOUT_STAGES)  # what folders had before it was written
        different = [name for name in wanted if wanted[name] != found.get(name)]
        if different:
            raise ValueError(
                f"{folder} holds records of a run with another {', '.join(different)}; give the "
                "same flags to go on with it, or remove the folder"
            )
    else:
        settings.write_text(json.dumps(wanted, indent=2))
    return folder


def calibrate(
    runs: Runs, options: CalibrationOptions, progress: Progress
) -> tuple[Fitted, dict[str, Any]]:
    """Record, fit, search masks, choose scales.

    Under PipeFusion there are masks alone, no scales.

    Returns:
        The calibration, and what was tried on the way to its masks and scales.

    Raises:
        ValueError: something that the model, its scheduler, the records or the layout do not allow.
    """
    check_layout(runs, options)
    alphas = sorted(options.significance_level)
    team = runs.team
    given = team.agreed(lambda: given_masks(options.start_from, options.num_inference_steps))
    runs.folder = team.agreed(lambda: prepare_folder(options, runs.prompts, team.layout))
    indices = list(range(len(runs.prompts)))
    runs.latents(0)  # also sets the scheduler's steps
    full = list(progress.track(runs.records(indices, "full"), "full computation", len(indices)))
    parts = build.split(full)
    metadata = {**runs.metadata(), "significance_levels": options.significance_level}
    levels, lags, epsilon = runs.levels(), options.max_lag, options.cache_ratio_threshold
    fitted = team.agreed(lambda: build.fit(parts, levels, lags, epsilon, metadata))
    report: dict[str, Any] = {}
    if options.computed_steps:
        trials = StagedTrials if team.place.stages > 1 else MaskTrials
        fitted, report["masks"] = trials(runs, options, fitted, parts, given, progress).search()
    if team.place.stages > 1:
        # A stage cannot say what it would have put out where the stages before it have forecast.
        return fitted, report
    first = team.agreed(lambda: build.conformal_scales(fitted, parts.calibrate, alphas))
    scales, report["scales_full"], report["scales_cached"] = {}, first, {}
    for alpha in alphas:
        scales[alpha], tried = settle(runs, options, fitted, parts, alpha, first[alpha], progress)
        report["scales_cached"][alpha] = tried
    return replace(fitted, scales=scales), report


def check_layout(runs: Runs, options: CalibrationOptions) -> None:
    """Refuse what cannot be calibrated in PipeFusion.

    Raises:
        ValueError: it says which flags to leave out, or to give.
    """
    place, replicas = runs.team.place, runs.team.replicas
    if place.stages == 1:
        return
    if not options.computed_steps:
        raise ValueError(
            "under PipeFusion a calibration is made for masks: say of how many steps with "
            "--computed_steps. For thresholds of the gate make one in another layout"
        )
    if place.shards * place.branches * replicas > 1:
        raise ValueError(
            "a calibration under PipeFusion is made with --pipefusion_parallel_degree alone: leave "
            "--ulysses_degree, --ring_degree, --use_cfg_parallel and --data_parallel_degree out. "
            "Its masks serve these layouts, too"
        )


def settle(
    runs: Runs,
    options: CalibrationOptions,
    fitted: Fitted,
    parts: build.Parts,
    alpha: float,
    first: float,
    progress: Progress,
) -> tuple[float, dict[float, float]]:
    """Choose a scale again on runs with the cache on, whose states are not those of full runs.

    Returns:
        The scale, and what the runs with each scale that was tried allow.
    """
    tried: dict[float, float] = {}
    count = len(runs.prompts)
    kind = "corrected" if fitted.weights.any() else "plain"
    tail = range(count - len(parts.calibrate), count)

    def allowed(scale: float) -> float:
        name = f"cached-{kind}-{options.cache_ratio_threshold}-{options.max_lag}-{scale}"
        title = f"cache on, alpha {alpha}, scale {scale:.3f}"
        with saved(replace(fitted, scales={alpha: scale})) as path:
            cache = {"calibration": path, "significance_level": alpha}
            cached = list(progress.track(runs.records(tail, name, **cache), title, len(tail)))
        tried[scale] = runs.team.agreed(
            lambda: build.conformal_scales(fitted, cached, [alpha])[alpha]
        )
        return tried[scale]

    return build.settled_scale(first, allowed), tried

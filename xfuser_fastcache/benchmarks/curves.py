"""From records to points with intervals, and from points to what a method gives at a quality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from xfuser_fastcache.benchmarks.quality import frechet_distance

# No picture counts for more, one that is equal to the bit included: an error of 1e-4 is a fortieth
# of an 8-bit step, and a mean over pictures must not hang on how small an invisible error is.
MOST_DB = 80.0
DRAWS = 2000
Record = dict[str, Any]


def psnr_of(mse: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of squared errors in [0, 1], at most `MOST_DB`."""
    with np.errstate(divide="ignore"):
        return np.minimum(-10 * np.log10(mse), MOST_DB)


def interval(values: np.ndarray, of: Any = np.mean) -> list[float] | None:
    """95 % bootstrap interval of a statistic of independent values; None for a single one."""
    if len(values) < 2:
        return None
    drawn = stats.bootstrap((values,), of, n_resamples=DRAWS, method="percentile", random_state=0)
    return [float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)]


def _mean(values: np.ndarray) -> dict[str, Any]:
    return {"mean": float(values.mean()), "interval_95": interval(values)}


def _frechet(own: np.ndarray, other: np.ndarray, paired: bool) -> dict[str, Any] | None:
    """Distance with a jackknife interval over pictures; None below 2 pictures a feature.

    A covariance of fewer pictures says little, and its distance is mostly bias. Pictures are left
    out one at a time and not resampled: drawn twice they would take away rank, which alone adds
    more to the distance than all else.
    """
    count = len(own)
    if count < 2 * own.shape[1]:
        return None
    without = [np.delete(np.arange(count), index) for index in range(count)]
    left_out = np.array(
        [frechet_distance(own[rows], other[rows] if paired else other) for rows in without]
    )
    distance = frechet_distance(own, other)
    error = np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    reach = float(stats.t.ppf(0.975, count - 1) * error)
    return {
        "distance": distance,
        "interval_95": [max(0.0, distance - reach), distance + reach],
    }


def _joined(records: list[Record], key: str) -> np.ndarray:
    """A measure picture by picture, in the order of the prompts."""
    by_prompt = {
        prompt: value
        for record in records
        for prompt, value in zip(record["prompts"], record[key], strict=True)
    }
    return np.array([by_prompt[prompt] for prompt in sorted(by_prompt)])


def point_of(
    records: list[Record], baseline: list[Record], drawn: np.ndarray | None
) -> dict[str, Any]:
    """One point of a curve from the records of one setting.

    Args:
        records: of the setting.
        baseline: of the uncached run in the same rounds.
        drawn: features of drawings of the prompts; None where prompts are no captions.
    """
    ratios = np.array([r["baseline_seconds"] / r["seconds"] for r in records])
    seconds = np.array([r["seconds"] for r in records])
    mse = _joined(records, "mse")
    psnr = psnr_of(mse)
    computed = [r["computed_steps"] for r in records if r["computed_steps"] is not None]
    peaks = [r["peak_bytes"] for r in records if r["peak_bytes"] is not None]
    point: dict[str, Any] = {
        "rounds": len({r["round"] for r in records}),
        "pictures": len(psnr),
        "speedup": {
            "median": float(np.median(ratios)),
            "quartiles": [float(q) for q in np.percentile(ratios, (25, 75))],
            "interval_95": interval(ratios, np.median),
        },
        "seconds": {
            "median": float(np.median(seconds)),
            "quartiles": [float(q) for q in np.percentile(seconds, (25, 75))],
        },
        # Ratios of decisions are no exact numbers of steps.
        "computed_steps": round(float(np.mean(computed)), 6) if computed else None,
        "peak_memory_bytes": int(np.median(peaks)) if peaks else None,
        "identical": not mse.any(),
        "psnr_db": _mean(psnr) | {"worst": float(psnr.min())},
        "ssim": _mean(_joined(records, "ssim")),
        "psnr_converged_db": _mean(psnr_of(_joined(records, "mse_converged"))),
        "ssim_converged": _mean(_joined(records, "ssim_converged")),
        "caption_accuracy": None,
        "frechet_uncached": None,
        "frechet_drawn": None,
    }
    if drawn is not None:
        passed = _joined(records, "passed")
        wilson = stats.binomtest(int(passed.sum()), len(passed)).proportion_ci(method="wilson")
        own, uncached = _joined(records, "features"), _joined(baseline, "features")
        point["caption_accuracy"] = {
            "ratio": float(passed.mean()),
            "interval_95": [float(wilson.low), float(wilson.high)],
        }
        point["frechet_drawn"] = _frechet(own, drawn, paired=False)
        point["frechet_uncached"] = _frechet(own, uncached, paired=True)
    return point


def points_of(records: list[Record], drawn: np.ndarray | None) -> dict[str, dict[str, Any]]:
    """{method: {setting: point}}; the uncached run is the method "baseline", setting ""."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record["kind"] == "point":
            groups[record["method"], record["value"]].append(record)
    points: dict[str, dict[str, Any]] = defaultdict(dict)
    for (method, value), group in groups.items():
        rounds = {record["round"] for record in group}
        same = [r for r in groups["baseline", ""] if r["round"] in rounds]
        points[method][value] = point_of(group, same, drawn)
    return dict(points)


def errors_of(records: list[Record], methods: dict[str, list[str]]) -> dict[str, str]:
    """{method: its own error}; with the settings that raised it, where others ran.

    Args:
        records: of the run.
        methods: {method: all its settings}.
    """
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if record["kind"] == "error":
            values = found[record["method"], record["error"]]
            values += [] if record["value"] in values else [record["value"]]
    return {
        method if set(values) == set(methods[method]) else f"{method} at {', '.join(values)}": error
        for (method, error), values in found.items()
    }


def hull(psnr: np.ndarray, speedup: np.ndarray) -> np.ndarray:
    """Indices of the points on the upper hull, from the fastest to the most exact.

    The hull is convex in relative time: between two settings lies what drawing some pictures with
    one and some with the other gives, whose PSNR and time are both the weighted means.

    Args:
        psnr: of each point, in dB.
        speedup: of each point.
    """
    time = 1 / speedup
    # Among points that are as good the fastest, from good to bad; slower and worse ones drop out.
    order = np.lexsort((time, -psnr))
    corners: list[int] = []
    for index in order:
        if corners and time[index] >= time[corners[-1]]:
            continue
        while len(corners) > 1 and _above(corners[-2], corners[-1], index, psnr, time):
            corners.pop()
        corners.append(int(index))
    return np.array(corners[::-1], dtype=int)


def _above(left: int, middle: int, right: int, psnr: np.ndarray, time: np.ndarray) -> bool:
    """Whether the middle point takes at least the time of the line between the other two."""
    share = (psnr[left] - psnr[middle]) / (psnr[left] - psnr[right])
    return bool(time[middle] >= time[left] + share * (time[right] - time[left]))


def speedup_at(level: float, psnr: np.ndarray, speedup: np.ndarray) -> float | None:
    """Best speedup on the hull at a PSNR of at least `level`; None where no point reaches it.

    Example:
        >>> speedup_at(50.0, np.array([60.0, 40.0]), np.array([1.0, 2.0]))
        1.3333333333333333
    """
    if not (psnr >= level).any():
        return None
    corners = hull(psnr, speedup)
    quality, time = psnr[corners], 1 / speedup[corners]
    # np.interp keeps the ends: below the worst point nothing faster was measured.
    return float(1 / np.interp(level, quality, time))


def speedups_at(
    levels: list[float], points: dict[str, dict[str, Any]], key: str
) -> dict[str, dict[str, float | None]]:
    """{level: {method: speedup}} on a PSNR named by its key; settings that change nothing left out.

    A picture that is equal to the bit has no PSNR, and a line towards it would be drawn from
    nowhere.
    """
    found: dict[str, dict[str, float | None]] = {}
    for level in levels:
        row = found[f"{level:g}"] = {}
        for method, settings in points.items():
            chosen = [p for p in settings.values() if not p["identical"]]
            psnr = np.array([p[key]["mean"] for p in chosen])
            row[method] = speedup_at(
                level, psnr, np.array([p["speedup"]["median"] for p in chosen])
            )
    return found


def psnr_at(
    counts: Sequence[int], points: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """{number of computed steps: {method: PSNR in dB}}; None where a method does not reach it.

    Exact where a setting computes that many; between two settings the mean of both, each weighted
    as pictures drawn with it would have to be.
    """
    found: dict[str, dict[str, float | None]] = {}
    for count in counts:
        row = found[str(count)] = {}
        for method, settings in points.items():
            pairs = sorted(
                (p["computed_steps"], p["psnr_db"]["mean"])
                for p in settings.values()
                if p["computed_steps"] is not None
            )
            steps, psnr = np.array(pairs).reshape(-1, 2).T
            within = len(steps) and steps[0] <= count <= steps[-1]
            row[method] = float(np.interp(count, steps, psnr)) if within else None
    return found

"""Audits a calibration: how often its skips do harm on fresh generations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xfuser_fastcache.artifacts.calibration import load_fitted
from xfuser_fastcache.calibration import build
from xfuser_fastcache.calibration.runs import Runs
from xfuser_fastcache.reports.progress import Progress


def audit(runs: Runs, path: Path, progress: Progress) -> dict[str, Any]:
    """Run fresh generations with the cache on, and say how often its skips did harm.

    Args:
        runs: of prompts that the calibration has not seen.
        path: the calibration.
        progress: shows it.

    Raises:
        ValueError: the calibration promises nothing, or the layout cannot tell whether it holds.
    """
    if runs.team.place.stages > 1:
        raise ValueError(
            "an audit needs what a skipped step would have put out, which a stage of PipeFusion "
            "does not know: leave --pipefusion_parallel_degree out"
        )
    fitted = load_fitted(path)
    alphas = sorted(fitted.scales)
    if not alphas:
        raise ValueError(
            f"{path} holds masks alone ({fitted.metadata.get('layout')}): it promises no share of "
            "harmful skips that could be audited"
        )
    report: dict[str, Any] = {"calibration": str(path), "digest": fitted.digest, "levels": {}}
    records: dict[float, list[Any]] = {}
    for alpha in alphas:
        cache = {"calibration": str(path), "significance_level": alpha}
        drawn = runs.records(range(len(runs.prompts)), f"audit-{alpha}", **cache)
        title = f"audit, alpha {alpha}"
        records[alpha] = list(progress.track(drawn, title, len(runs.prompts)))
    epsilon = fitted.metadata["cache_ratio_threshold"]
    for alpha in alphas:
        report["levels"][str(alpha)] = build.audit(fitted, records[alpha], epsilon)
    return report


def print_audit(report: dict[str, Any], console: Console) -> None:
    """Print an audit as a table."""
    table = Table(title=f"audit of {report['calibration']}")
    for name in ("alpha", "false-skip rate", "95 %", "skips", "hit ratio", "oracle's", "literal"):
        table.add_column(name, justify="right")
    for alpha, found in report["levels"].items():
        low, high = found["false_skip_interval"] or (float("nan"),) * 2
        table.add_row(
            alpha,
            f"{found['false_skip_rate']:.4f}",
            f"{low:.4f} to {high:.4f}",
            str(found["skips"]),
            f"{found['hit_ratio']:.1%}",
            f"{found['oracle']['hit_ratio']:.1%}",
            f"{found['literal_test']['false_skip_rate']:.4f}",
        )
    console.print(table)

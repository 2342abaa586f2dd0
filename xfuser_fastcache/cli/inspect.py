"""Say what a file of `fastcache calibrate` or `fastcache fit-maps` is for, and what it covers.

    fastcache inspect toys/flux/fastcache.safetensors --plot runs/flux.png
    fastcache inspect runs/flux.safetensors --audit runs/audit.json
    fastcache inspect runs/flux.safetensors --json

No model is loaded. The plot shows masks, corrections and predicted errors over the noise level.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from xfuser_fastcache.artifacts.calibration import CALIBRATION, Fitted, load_fitted
from xfuser_fastcache.artifacts.file import kind_of
from xfuser_fastcache.artifacts.linear_maps import LINEAR_MAPS, load_maps
from xfuser_fastcache.calibration.audit import print_audit
from xfuser_fastcache.calibration.inspection import (
    inspected,
    inspected_maps,
    print_inspected,
    save_plot,
)
from xfuser_fastcache.cli.flags import flags_of


def main(arguments: list[str]) -> int:
    """Inspect; return the exit status."""
    flags = flags_of("fastcache inspect", __doc__)
    flags.add_argument("file", type=Path, metavar="FILE", help="a calibration, or linear maps")
    flags.add_argument("--plot", type=Path, metavar="PNG", help="picture of a calibration to write")
    flags.add_argument(
        "--computed_steps", type=int, help="of the mask whose corrections are drawn; a middle one"
    )
    flags.add_argument("--audit", type=Path, metavar="REPORT", help="of `fastcache audit`, to show")
    flags.add_argument("--json", action="store_true", help="print JSON and nothing else")
    given = flags.parse_args(arguments)
    fitted: Fitted | None = None
    if kind_of(given.file, (CALIBRATION, LINEAR_MAPS)) is CALIBRATION:
        fitted = load_fitted(given.file)
        found = inspected(fitted)
    else:
        found = inspected_maps(load_maps(given.file))
    if given.computed_steps is not None and not given.plot:
        raise ValueError("--computed_steps says what --plot draws; give --plot PNG too")
    if fitted is None and (given.plot or given.audit):
        raise ValueError(f"{given.file} holds linear maps; --plot and --audit are of calibrations")
    audit = _audit_of(given.audit, found["digest"]) if given.audit else None
    if given.json:
        print(json.dumps({**found, "audit": audit}, indent=1))
    else:
        console = Console(width=120)
        print_inspected(found, str(given.file), console)
        if audit:
            print_audit(audit, console)
    if fitted is not None and given.plot:
        save_plot(fitted, given.plot, given.computed_steps)
    return 0


def _audit_of(path: Path, digest: str) -> dict[str, Any]:
    """Return an audit's report.

    Raises:
        ValueError: it is none, or one of another calibration.
    """
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or "levels" not in report:
        raise ValueError(f"{path} is no report of fastcache audit")
    if report.get("digest") != digest:
        raise ValueError(
            f"{path} is the audit of a calibration with the digest {report.get('digest')}, and the "
            f"file's is {digest}. Audit this one: fastcache audit FILE --report {path}"
        )
    return report

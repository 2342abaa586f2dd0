"""One rank of one xDiT layout on the toy FLUX, with and without audits; started by `run_world`.

Arguments: the degree of Ulysses and that of PipeFusion.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch.distributed as dist  # noqa: E402
from support.toy import MASK, generate, load, same  # noqa: E402
from support.worlds import report  # noqa: E402

from xfuser_fastcache import (  # noqa: E402
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    """Build the layout, and generate without audits, then with all skips audited."""
    ulysses, stages = sys.argv[1:]
    cpu_platform.enable_cpu_platform()
    pipe = load(ulysses_degree=int(ulysses), pipefusion_parallel_degree=int(stages), warmup_steps=1)
    said = Said()
    logging.getLogger("xfuser_fastcache").addHandler(said)

    def run(**options: Any) -> tuple[Any, dict[str, Any]]:
        apply_cache_on_transformer(
            pipe.transformer, scheduler=pipe.scheduler, sync_timeout_s=60, verify_consensus=True,
            forecaster="reuse", **options,
        )  # fmt: skip
        try:
            return generate(pipe), get_cache_statistics(pipe.transformer)
        finally:
            remove_cache(pipe.transformer)

    options = {"cache_ratio_threshold": 0.1, "steps_mask": MASK}
    plain, _ = run(**options)
    audited, statistics = run(**options, shadow_audit=1.0)
    report(
        dist.get_rank(),
        same=same(plain, audited),
        statistics=statistics,
        said=[line for line in said.lines if "shadow_audit" in line],
    )
    cpu_platform.finish()


if __name__ == "__main__":
    main()

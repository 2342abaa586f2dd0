"""One rank of Ulysses 2 on the toy FLUX in which something goes wrong on rank 1.

`chaos_worker.py CASE`; every case runs the real pipeline with a cache.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch.distributed as dist  # noqa: E402
from support.toy import generate, load  # noqa: E402
from support.worlds import report  # noqa: E402

from xfuser_fastcache import (  # noqa: E402
    ConsensusError,
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.hooks import hook_on  # noqa: E402
from xfuser_fastcache.state import prober  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402

BAD_STEP = 5
TIMEOUT_S = 3.0


def disagree(cache: Any) -> None:
    """Rank 1 measures a change that forbids skipping, at every odd step."""
    measure = prober.measure

    def inflated(hidden_states: Any, reference: Any, exponent: int, *norm: int) -> Any:
        moments = measure(hidden_states, reference, exponent, *norm)
        if dist.get_rank() == 1 and cache.call.step % 2:
            moments[0] += moments[2]  # CHANGE grows by REFERENCE: a change of 100 %
        return moments

    prober.measure = inflated


def decide_alone(cache: Any) -> None:
    """Leave every rank with its own statistics: the control without consensus."""
    cache.consensus._distributed = False
    cache.consensus._check = lambda *_: None


def see_nan(cache: Any) -> None:
    """Rank 1 measures NaN at one step."""
    measure = prober.measure

    def broken(hidden_states: Any, reference: Any, exponent: int, *norm: int) -> Any:
        if dist.get_rank() == 1 and cache.call.step == BAD_STEP:
            hidden_states = hidden_states * float("nan")
        return measure(hidden_states, reference, exponent, *norm)

    prober.measure = broken


def stay_away(cache: Any) -> None:
    """Rank 1 stops before it posts the vector of one step."""
    post = cache.consensus.post

    def late(header: Any, moments: Any) -> Any:
        if dist.get_rank() == 1 and header.step == BAD_STEP:
            time.sleep(2.5 * TIMEOUT_S)
        return post(header, moments)

    cache.consensus.post = late


def stop_in_attention(cache: Any) -> None:
    """Rank 1 stops inside a computed block, before attention's all-to-all."""
    run_block = cache.run_block

    def late(index: int, *arguments: Any) -> Any:
        if dist.get_rank() == 1 and index == 3 and cache.call.step == 1:
            time.sleep(2.5 * TIMEOUT_S)
        return run_block(index, *arguments)

    cache.run_block = late


CASES = {
    "uncoordinated": (disagree, decide_alone),
    "coordinated": (disagree,),
    "nan": (see_nan,),
    "absent": (stay_away,),
    "attention": (stop_in_attention,),
}


class Warnings(logging.Handler):
    """Collects the cache's log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main(case: str) -> None:
    """Run one case and report."""
    cpu_platform.enable_cpu_platform()
    log = Warnings()
    pipe = load(ulysses_degree=2)
    logging.getLogger("xfuser_fastcache").addHandler(log)
    generate(pipe, num_inference_steps=2)
    hurries = case in ("absent", "attention")
    apply_cache_on_transformer(
        pipe.transformer,
        scheduler=pipe.scheduler,
        cache_ratio_threshold=1.5,
        sync_timeout_s=TIMEOUT_S if hurries else 60.0,
    )
    cache = hook_on(pipe.transformer).engine
    for sabotage in CASES[case]:
        sabotage(cache)
    started, error = time.perf_counter(), ""
    try:
        generate(pipe)
    except ConsensusError as raised:
        error = f"{type(raised).__name__}: {raised}"
    seconds = time.perf_counter() - started
    decisions = list(cache.decisions.entries)
    statistics = get_cache_statistics(pipe.transformer)
    remove_cache(pipe.transformer)  # works also where the group is broken
    report(
        dist.get_rank(),
        seconds=seconds,
        error=error,
        decisions=decisions,
        statistics=statistics,
        removed=hook_on(pipe.transformer) is None,
        warnings=log.messages,
    )
    if error:
        time.sleep(TIMEOUT_S)  # the other rank has its own error to report
    else:
        cpu_platform.finish()


if __name__ == "__main__":
    main(sys.argv[1])

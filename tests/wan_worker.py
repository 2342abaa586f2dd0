"""One rank of one layout: every version of Wan that xDiT runs there, with a mask, at two sizes.

The second size makes 27 tokens, which do not divide by two or four ranks.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.worlds import report  # noqa: E402
from support.xdit_runs import describe, latents_of, own_share  # noqa: E402

from diffusers_adapters.tiny import TINY_MODELS  # noqa: E402
from xfuser_fastcache import get_cache_statistics, get_cache_trace  # noqa: E402
from xfuser_fastcache.apply import (  # noqa: E402
    apply_cache_on_pipeline,
    denoisers_of,
    remove_cache_from_pipeline,
)
from xfuser_fastcache.hooks import hook_on  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402
from xfuser_fastcache.xdit.groups import XDiTLayout  # noqa: E402
from xfuser_fastcache.xdit.loaded import put_in_layout  # noqa: E402

STEPS = 20
MASK = [int(step % 3 == 0 or step in (1, 19)) for step in range(STEPS)]
SIZES = (32, 48)
# Of one world: longer than a step, shorter than what is left when the second expert takes over.
PATIENCE_S, PAUSE_S = 6.0, 0.6


def holds(denoiser: Any) -> bool:
    """Say whether a denoiser's cache holds anchors."""
    return any(
        memory.anchors
        for local in hook_on(denoiser).engine.branches.values()
        for patches in local.memories.values()
        for memory in patches.values()
    )


class Said(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def cases(name: str, size: int, slow: bool, flags: dict[str, Any]) -> dict[str, Any]:
    """Draw uncached, at threshold 0, and twice by a mask; return what is to be promised.

    Args:
        name: of the tiny pipeline.
        size: of a side, in pixels.
        slow: whether two experts take their time, and watchdogs have little patience.
        flags: of xDiT.
    """
    replicas = flags.get("data_parallel_degree", 1)
    pipe, call = TINY_MODELS[name].make(batch=replicas, size=size)
    call["num_inference_steps"] = STEPS
    pipe.set_progress_bar_config(disable=True)
    pipe = put_in_layout(pipe, height=size, width=size, num_inference_steps=STEPS, **flags)
    denoisers = denoisers_of(pipe)
    last = list(denoisers.values())[-1]
    held: list[bool] = []

    def generate(**more: Any) -> torch.Tensor:
        return latents_of(pipe(**own_share(call, replicas), **more))

    def pause(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if last is not pipe.transformer and holds(last):
            held.append(holds(pipe.transformer))
            time.sleep(PAUSE_S if slow else 0)
        return tensors

    control = generate()
    apply_cache_on_pipeline(pipe, cache_ratio_threshold=0.0, sync_timeout_s=60)
    exact = torch.equal(generate(), control)
    remove_cache_from_pipeline(pipe)
    said = Said()
    logging.getLogger("xfuser_fastcache").addHandler(said)
    slow = slow and len(denoisers) > 1
    patience = PATIENCE_S if slow else 60
    apply_cache_on_pipeline(pipe, steps_mask=MASK, sync_timeout_s=patience, verify_consensus=True)
    cached = generate(callback_on_step_end=pause)
    repeats = torch.equal(generate(), cached)
    statistics = [get_cache_statistics(one) for one in denoisers.values()]
    rows = [row for one in denoisers.values() for row in get_cache_trace(one)]
    remove_cache_from_pipeline(pipe)
    logging.getLogger("xfuser_fastcache").removeHandler(said)
    return {
        "group": XDiTLayout().decision_group(denoisers["transformer"]).ranks,
        "control": describe(control)["sample_norms"],
        "exact": exact,
        "repeats": repeats,
        "finite": bool(cached.isfinite().all()),
        "changed": not torch.equal(cached, control),
        "restored": torch.equal(generate(), control),
        "digest": " ".join(one["decisions_digest"] for one in statistics),
        "collectives": max(one["collectives_per_step"] for one in statistics),
        "steps": [one["steps"] for one in statistics],
        "recomputed": sum(one["recomputed"] for one in statistics),
        "decided": {str(row["step"]): row["decision"] for row in rows if row["branch"] == 0},
        "first_holds": held,
        "said": said.lines,
    }


def main() -> None:
    """Run the models named on the command line at both sizes, and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--use_cfg_parallel", action="store_true")
    for degree in ("ulysses", "ring", "data_parallel"):
        parser.add_argument(f"--{degree}_degree", type=int, default=1)
    flags = vars(parser.parse_args())
    models = flags.pop("models")
    cpu_platform.enable_cpu_platform()
    two = int(os.environ["WORLD_SIZE"]) == flags["ulysses_degree"] == 2
    found = {
        f"{name}, {size}": cases(name, size, two and size == SIZES[0], flags)
        for name in models
        for size in SIZES
    }
    report(dist.get_rank(), found=found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()

"""One rank of one layout: every registered model that runs there, uncached and cached.

Tiny pipelines with random weights: what is tested is that ranks agree and that nothing hangs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tiny_models import TINY_PIPELINES  # noqa: E402
from worlds import report  # noqa: E402
from xdit_control import own_share, wrap  # noqa: E402

from xfuser_fastcache.xdit import cpu_platform  # noqa: E402
from xfuser_fastcache.xdit.mends import mend_xfuser  # noqa: E402

STEPS = 10
# Far above what random weights change from step to step.
THRESHOLD = 3.0
# Eight blocks: a stage of PipeFusion 4 must not be empty.
SIZES = {"flux": {"num_layers": 4, "num_single_layers": 4}}


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bitwise equality; two ranks without output agree."""
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def cases(model: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Run one model in this world's layout."""
    from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache

    replicas = flags["data_parallel_degree"]
    pipeline, call = TINY_PIPELINES[model](batch=replicas, **SIZES.get(model, {}))
    call["num_inference_steps"] = STEPS
    pipe, _ = wrap(pipeline, call, warmup_steps=1, **flags)

    def generate() -> torch.Tensor | None:
        output = pipe(**own_share(call, replicas))
        return None if output is None else output.images

    def apply(**options: Any) -> None:
        apply_cache_on_transformer(
            pipe.transformer,
            scheduler=pipe.scheduler,
            sync_timeout_s=60,
            verify_consensus=True,
            **options,
        )

    control = generate()
    found: dict[str, Any] = {"has_output": control is not None}
    found["control_repeats"] = same(control, generate())
    apply(cache_ratio_threshold=0)
    found["threshold_0_exact"] = same(control, generate())
    remove_cache(pipe.transformer)
    for granularity in ("stack", 3):
        apply(cache_ratio_threshold=THRESHOLD, granularity=granularity)
        cached = generate()
        repeats = same(cached, generate())
        statistics = get_cache_statistics(pipe.transformer)
        remove_cache(pipe.transformer)
        found[f"granularity {granularity}"] = {
            "repeats": repeats,
            "changed": control is None or not same(control, cached),
            "finite": cached is None or bool(cached.isfinite().all()),
            "digest": statistics["decisions_digest"],
            "hits": statistics["block_approx_ratio"],
            "collectives_per_step": statistics["collectives_per_step"],
            "steps": statistics["steps"],
        }
    found["restored_exact"] = same(control, generate())
    return found


def main() -> None:
    """Run the models named on the command line and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--use_cfg_parallel", action="store_true")
    for name in ("ulysses", "ring", "pipefusion_parallel", "data_parallel"):
        parser.add_argument(f"--{name}_degree", type=int, default=1)
    flags = vars(parser.parse_args())
    models = flags.pop("model")
    cpu_platform.enable_cpu_platform()
    mend_xfuser()
    found = {model: cases(model, flags) for model in models}
    from xfuser.core.distributed import get_model_replica_group

    report(dist.get_rank(), group=get_model_replica_group().ranks, models=found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()

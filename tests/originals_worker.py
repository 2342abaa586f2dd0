"""xDiT's own teacache and fbcache beside ours, on one rank of tiny FLUX.

Started by `worlds.run_world`, since xfuser needs the CPU platform and its process groups.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch.distributed as dist  # noqa: E402
from support.original_runs import STEPS, Generator  # noqa: E402
from support.worlds import report  # noqa: E402

from xfuser_fastcache.xdit import cpu_platform  # noqa: E402


def ours(generate: Generator, **options: Any) -> dict[str, Any]:
    """Return which steps our cache computes, and what its gate weighed."""
    with generate.ours(**options):
        generate()
        return {"computed": generate.computed, "statistics": generate.statistics()}


def theirs(apply: Any, threshold: float, num_steps: int) -> dict[str, list[int]]:
    """Return which steps xfuser's cache computes, and at which its reference was renewed."""
    generate = Generator("flux")
    apply(generate.transformer, rel_l1_thresh=threshold, num_steps=num_steps)
    (blocks,) = generate.transformer.transformer_blocks
    references: list[Any] = [None]
    kept = blocks.cache_context
    blocks.register_forward_hook(lambda *_: references.append(kept.modulated_inputs))
    generate()
    renewed = [i for i in range(STEPS) if references[i + 1] is not references[i]]
    return {"computed": generate.computed, "renewed": renewed}


def main() -> None:
    """Run the originals at thresholds between the sums that occur, and report."""
    cpu_platform.enable_cpu_platform()
    dist.init_process_group("gloo")
    from xfuser.core.distributed import parallel_state

    parallel_state.init_distributed_environment(world_size=1, rank=0, local_rank=0)
    parallel_state.initialize_model_parallel()
    from xfuser.model_executor.cache.adapters.flux import apply_fbcache, apply_teacache

    generate = Generator("flux")
    found: dict[str, Any] = {"tea": {}, "fb": {}}
    for threshold in (0.45, 0.9, 1.6, 3.0):
        tea = {"use_cache": "Tea", "rel_l1_thresh": threshold, "num_warmup_steps": 2}
        found["tea"][threshold] = {
            "ours": ours(generate, scheduler=True, **tea)["computed"],
            "theirs": theirs(apply_teacache, threshold, STEPS - 1)["computed"],
            "theirs_told_all_steps": theirs(apply_teacache, threshold, STEPS)["computed"],
        }
    changes = ours(generate, use_cache="Fb", cache_ratio_threshold=0)["statistics"]
    changes = sorted(change for change in changes if change is not None)
    for rank in (2, 5, 9):
        threshold = (changes[rank] + changes[rank + 1]) / 2
        run = theirs(apply_fbcache, threshold, STEPS)
        found["fb"][threshold] = {
            "ours": ours(generate, use_cache="Fb", cache_ratio_threshold=threshold)["computed"],
            "theirs": run["computed"],
            "renewed": run["renewed"],
        }
    report(dist.get_rank(), **found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()

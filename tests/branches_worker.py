"""One of two ranks that decide together: branches, and two caches side by side.

Without arguments it is plain torch.distributed, and each rank's latents and prompts are its own, as
if it held its part of the tokens. With xDiT's flags two pipelines of xfuser, with toy weights.
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
from support.flux import STEPS  # noqa: E402
from support.loops import (  # noqa: E402
    LEVELS,
    Branch,
    begin,
    cached,
    denoise,
    same,
)
from support.toy import generate, load  # noqa: E402
from support.toy import same as same_image  # noqa: E402
from support.worlds import report  # noqa: E402
from test_branches import ONE, OTHER, engine_of  # noqa: E402
from torch import nn  # noqa: E402

from xfuser_fastcache import (  # noqa: E402
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402

WAIT = {"sync_timeout_s": 30, "verify_consensus": True}


def decided(transformer: nn.Module) -> dict[str, Any]:
    """Return what all ranks must agree on."""
    statistics = get_cache_statistics(transformer)
    names = ("collectives", "collectives_per_step", "decisions_digest", "block_approx_ratio")
    return {
        **{name: statistics[name] for name in names},
        "entries": list(engine_of(transformer).decisions.entries),
    }


def three_branches(rank: int, named: bool, left_out: tuple[int, ...] = ()) -> dict[str, Any]:
    """Denoise three branches twice together, and each alone; `left_out` lacks the second one."""
    options = {"granularity": 3, "cache_ratio_threshold": 0.4, **WAIT}
    # Rank 0 moves little in the second branch, rank 1 much: only together do they know.
    moves = [(1, 1), (0.1, 6), (3, 3)]
    branches = [Branch(i, moves=moves[i][rank], rank=rank) for i in range(3)]
    alone = []
    for index, branch in enumerate(branches):
        transformer = cached(**options)
        missing = dict.fromkeys(left_out if index == 1 else (), (branch,))
        alone += denoise(transformer, Branch(90, rank=rank), branch, named=named, left_out=missing)[
            1:
        ]
        remove_cache(transformer)
    transformer = cached(**options)
    missing = dict.fromkeys(left_out, (branches[1],))
    found = [denoise(transformer, *branches, named=named, left_out=missing) for _ in range(2)]
    result = decided(transformer)
    remove_cache(transformer)
    return {
        **result,
        "alone": all(map(same, found[0], alone)),
        "repeats": all(map(same, found[0], found[1])),
    }


def two_caches(rank: int) -> dict[str, Any]:
    """Take two cached transformers in turn, step by step and generation by generation."""
    branches = [Branch(i, rank=rank) for i in range(2)]
    options = [{**o, **WAIT} for o in (ONE, OTHER)]
    alone = []
    for seed, branch in enumerate(branches):
        transformer = cached(seed, **options[seed])
        alone += denoise(transformer, branch)
        remove_cache(transformer)
    transformers = [cached(seed, **options[seed]) for seed in (0, 1)]
    begin(*branches)
    for level in LEVELS:
        for transformer, branch in zip(transformers, branches, strict=True):
            branch.step(transformer, level, named=False)
    steps = all(same(branch.outputs, a) for branch, a in zip(branches, alone, strict=True))
    again = [denoise(transformers[i], branches[i])[0] for i in (1, 0)]
    groups = {id(engine_of(t).consensus._wire) for t in transformers}
    result = {"decided": [decided(t) for t in transformers], "groups": len(groups)}
    remove_cache(transformers[0])
    last = denoise(transformers[1], branches[1])[0]
    # The group that is free now goes to the next cache, beside the one that is still in use.
    transformers[0] = cached(0, **options[0])
    anew = [denoise(transformers[i], branches[i])[0] for i in (0, 1)]
    for transformer in transformers:
        remove_cache(transformer)
    return {
        **result,
        "steps": steps,
        "generations": same(again[0], alone[1]) and same(again[1], alone[0]),
        "other_removed": same(last, alone[1]),
        "applied_anew": same(anew[0], alone[0]) and same(anew[1], alone[1]),
    }


def two_pipelines_of_xfuser(**flags: Any) -> dict[str, Any]:
    """Take two pipelines that xfuser has wrapped in turn, uncached and with a cache each."""
    pipes = [load(**flags, warmup_steps=1) for _ in range(2)]
    control = [generate(pipe) for pipe in (*pipes, *pipes)]
    options = [{**o, **WAIT, "sync_timeout_s": 60} for o in (ONE, OTHER)]

    def cache(index: int) -> None:
        pipe = pipes[index]
        apply_cache_on_transformer(pipe.transformer, scheduler=pipe.scheduler, **options[index])

    alone = []
    for index, pipe in enumerate(pipes):
        cache(index)
        alone.append(generate(pipe))
        remove_cache(pipe.transformer)
    cache(0), cache(1)
    found = [generate(pipe) for pipe in (*pipes, *pipes)]
    decisions = [decided(pipe.transformer) for pipe in pipes]
    remove_cache(pipes[0].transformer)
    last = [generate(pipe) for pipe in pipes]
    remove_cache(pipes[1].transformer)
    return {
        "uncached": all(same_image(image, control[0]) for image in control),
        "decided": decisions,
        "together": all(map(same_image, found, [*alone, *alone])),
        "changed": control[0] is None or not same_image(alone[0], alone[1]),
        "other_removed": same_image(last[0], control[0]) and same_image(last[1], alone[1]),
    }


@torch.no_grad()
def main() -> None:
    """Run all cases and report them."""
    if sys.argv[1:]:
        parser = argparse.ArgumentParser()
        for flag in ("ulysses_degree", "pipefusion_parallel_degree", "num_pipeline_patch"):
            parser.add_argument(f"--{flag}", type=int, default=1)
        cpu_platform.enable_cpu_platform()
        found = two_pipelines_of_xfuser(**vars(parser.parse_args()))
        report(dist.get_rank(), **found)
        cpu_platform.finish()
        return
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    report(
        rank,
        steps=STEPS,
        by_order=three_branches(rank, named=False),
        by_name=three_branches(rank, named=True),
        interval=three_branches(rank, named=True, left_out=(0, 3, 4)),
        two=two_caches(rank),
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

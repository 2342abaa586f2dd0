"""xDiT's own caches on the ranks of Ulysses, from whichever copy of xfuser lies in a folder.

Started by `worlds.run_world` with that folder; "installed" stands for xfuser as it is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if sys.argv[1] != "installed":
    sys.path.insert(0, sys.argv[1])

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.worlds import report  # noqa: E402
from support.xdit_runs import wrap  # noqa: E402

from diffusers_adapters.tiny import TINY_PIPELINES  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402

STEPS = 12


def decided(method: str, threshold: float) -> list[int]:
    """Return the steps at which a generation under one of xDiT's caches ran all blocks."""
    from xfuser.model_executor.cache import apply_cache
    from xfuser.model_executor.cache.presets import CacheDitAdapterConfig, DBCachePreset

    # Which xDiT's runner wraps: cache-dit passes pipelines of xfuser's own classes by.
    pipeline, call = TINY_PIPELINES["flux-kontext"]()
    call["num_inference_steps"] = STEPS
    pipe, _ = wrap(pipeline, call, ulysses_degree=dist.get_world_size())
    model = pipe.transformer
    steps: list[int] = []
    computed: list[int] = []
    model.x_embedder.register_forward_pre_hook(lambda *_: steps.append(len(steps)))
    last = model.single_transformer_blocks[-1]
    last.norm.register_forward_pre_hook(lambda *_: computed.append(steps[-1]))
    options: dict[str, Any] = {}
    if method == "dbcache":
        blocks = (("transformer_blocks", "Pattern_1"), ("single_transformer_blocks", "Pattern_1"))
        options["adapter_config"] = CacheDitAdapterConfig(blocks=blocks)
        options["preset_kwargs"] = DBCachePreset(
            Fn_compute_blocks=1, residual_diff_threshold=threshold, max_warmup_steps=2,
            scm_policy=None, enable_taylorseer=False,
        )  # fmt: skip
    else:
        options["preset_kwargs"] = {"residual_diff_threshold": threshold}
    apply_cache(method, STEPS, pipe, transformer=model, **options)
    pipe(**{**call, "generator": torch.Generator().manual_seed(1)})
    return computed


def main() -> None:
    """Measure a change on uneven shards, then draw under each cache, and report."""
    cpu_platform.enable_cpu_platform()
    from xfuser.core.distributed import (
        get_world_group,
        init_distributed_environment,
        parallel_state,
    )

    init_distributed_environment()
    ranks = dist.get_world_size()
    rank = dist.get_rank()
    parallel_state.initialize_model_parallel(ulysses_degree=ranks, sequence_parallel_degree=ranks)
    from xfuser.model_executor.cache import utils

    assert sys.argv[1] == "installed" or utils.__file__.startswith(sys.argv[1])
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, 7, 8, generator=generator)
    after = before + torch.linspace(0, 1, 7)[:, None] * torch.randn(1, 7, 8, generator=generator)
    own = slice(0, 5) if rank == 0 else slice(5, 7)
    if ranks == 1:
        own = slice(None)
    blocks = utils.FBCachedTransformerBlocks([torch.nn.Identity()])
    distance = float(blocks.l1_distance(before[:, own], after[:, own]))
    bad = after.clone()
    bad[:, 0] = torch.inf
    infinite = float(blocks.l1_distance(before[:, own], bad[:, own]))

    called: list[str] = []
    for name in ("broadcast", "barrier"):
        original = getattr(dist, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            called.append(_name)
            return _original(*args, **kwargs)

        setattr(dist, name, counted)
    found = {}
    for method, threshold in (("fbcache", 0.3), ("teacache", 0.9), ("dbcache", 0.5)):
        if sys.argv[1] == "installed" and method == "dbcache":
            continue  # asks for a CUDA device
        found[method] = decided(method, threshold)
    report(rank, distance=distance, infinite=infinite, decided=found, called=called)
    assert get_world_group().world_size == ranks
    cpu_platform.finish()


if __name__ == "__main__":
    main()

"""xDiT's own step caches, put on a pipeline by xfuser's own call; for comparisons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform


@contextmanager
def own_cache(
    method: str, pipe: Any, transformer: torch.nn.Module, steps: int, threshold: float
) -> Iterator[None]:
    """Put one of xDiT's caches on a pipeline's transformer.

    It replaces lists of blocks for good. Where there is one process, the groups that it asks for
    are made first and end with it.

    Args:
        method: "teacache" or "fbcache".
        pipe: diffusers' or xfuser's.
        transformer: the diffusers model in it.
        steps: of a generation.
        threshold: of the residual's relative change.

    Raises:
        NotImplementedError: under PipeFusion.
    """
    with _groups_of_one():
        from xfuser.core.distributed import get_pipeline_parallel_world_size
        from xfuser.model_executor.cache import apply_cache

        if get_pipeline_parallel_world_size() > 1:
            # The call itself would take a stage's blocks for the whole model.
            raise NotImplementedError(
                f"xDiT's runner refuses {method} under PipeFusion; refused here in its stead"
            )
        options = json.dumps({"residual_diff_threshold": threshold})
        apply_cache(method, steps, pipe, transformer=transformer, cache_config=options)
        yield


@contextmanager
def _groups_of_one() -> Iterator[None]:
    """Let xfuser's caches find the groups that they ask for, where there is one process."""
    enable_cpu_platform()
    from xfuser.core.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.init_distributed_environment(world_size=1, rank=0, local_rank=0)
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()

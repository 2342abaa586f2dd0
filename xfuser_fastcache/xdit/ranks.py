"""What xfuser knows of this rank, for rooms that do not import it; set up once a layout is."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn


class Place(NamedTuple):
    """Where a rank stands in a layout, as far as what its transformer is given and puts out.

    Attributes:
        replica: of data parallelism.
        stage: of PipeFusion: the first is given the latents, the last puts out the noise.
        stages: of PipeFusion; 1 without it.
        shard: of a picture's tokens; 0 where each rank is given all.
        shards: ranks that share them.
        branch: of guidance; 0 where each rank is given all.
        branches: ranks that share them.
    """

    replica: int = 0
    stage: int = 0
    stages: int = 1
    shard: int = 0
    shards: int = 1
    branch: int = 0
    branches: int = 1


def place_of(transformer: nn.Module) -> Place:
    """Return where this rank stands, for a transformer of xfuser's."""
    from xfuser.core.distributed import parallel_state as state

    from xfuser_fastcache.models.wrappers import unwrapped
    from xfuser_fastcache.xdit.groups import cuts

    cuts_tokens, cuts_guidance = cuts(unwrapped(transformer))
    tokens = state.get_sequence_parallel_rank(), state.get_sequence_parallel_world_size()
    guidance = (
        state.get_classifier_free_guidance_rank(),
        state.get_classifier_free_guidance_world_size(),
    )
    return Place(
        state.get_data_parallel_rank(),
        state.get_pipeline_parallel_rank(),
        state.get_pipeline_parallel_world_size(),
        *((0, 1) if cuts_tokens else tokens),
        *((0, 1) if cuts_guidance else guidance),
    )


def patch_now() -> tuple[int, int]:
    """Return which of PipeFusion's patches is at work, and of how many; 0 of 1 where all are."""
    state = runtime_state()
    if not state.patch_mode:
        return 0, 1
    return state.pipeline_patch_idx, state.num_pipeline_patch


def pipeline_in_words() -> str:
    """Return what PipeFusion's pictures depend on."""
    from xfuser.core.distributed import get_pipeline_parallel_world_size

    state = runtime_state()
    return (
        f"PipeFusion: {get_pipeline_parallel_world_size()} stages, patches: "
        f"{state.num_pipeline_patch}, synchronous steps: {state.runtime_config.warmup_steps}"
    )


def data_replica() -> tuple[int, int]:
    """Return which data-parallel replica this rank belongs to, and how many there are."""
    from xfuser.core.distributed import get_data_parallel_rank, get_data_parallel_world_size

    return get_data_parallel_rank(), get_data_parallel_world_size()


def sequence_ranks() -> int:
    """Return how many ranks share a sequence of tokens."""
    from xfuser.core.distributed import get_sequence_parallel_world_size

    return get_sequence_parallel_world_size()


def runtime_state() -> Any:
    """Return xfuser's state of the run: sizes of the model, options of the pipeline."""
    from xfuser.core.distributed import get_runtime_state

    return get_runtime_state()


def all_ranks(mine: Any) -> list[Any]:
    """Return what every rank gives, on every rank; a collective call on the host."""
    from xfuser.core.distributed import get_world_group

    return _gathered(mine, get_world_group())


def ranks_of_replica(mine: Any, limit_s: float) -> list[Any]:
    """Return what every rank of this data-parallel replica gives; likewise.

    Raises:
        TimeoutError: as `meet_all`.
    """
    from xfuser.core.distributed.parallel_state import get_model_replica_group

    group = get_model_replica_group()
    _meet(group, limit_s)
    return _gathered(mine, group)


def meet_all(limit_s: float) -> None:
    """Wait for all ranks, for so many seconds.

    Raises:
        TimeoutError: some did not come; the first rank names them.
    """
    from xfuser.core.distributed import get_world_group

    _meet(get_world_group(), limit_s)


def _meet(group: Any, limit_s: float) -> None:
    if group.world_size == 1:
        return
    try:
        limit = timedelta(seconds=limit_s)
        dist.monitored_barrier(group.cpu_group, timeout=limit, wait_all_ranks=True)
    except RuntimeError as error:
        raise TimeoutError(
            f"ranks {list(group.ranks)} did not all come within {limit_s:g} s: {error}"
        ) from error


def _gathered(mine: Any, group: Any) -> list[Any]:
    found: list[Any] = [None] * group.world_size
    dist.all_gather_object(found, mine, group=group.cpu_group)
    return found

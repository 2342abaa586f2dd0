"""What xfuser knows of this rank, for rooms that do not import it; set up once a layout is."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


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

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=get_world_group().cpu_group)
    return found

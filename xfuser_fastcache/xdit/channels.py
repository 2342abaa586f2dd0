"""Makes xfuser's process groups anew after a failure.

A wait that has ended by its limit breaks a group of gloo, and an exception on one rank leaves
messages in it that nobody takes. Ranks that have met again can therefore use none of them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from xfuser_fastcache.consensus.board import Board
from xfuser_fastcache.xdit.gloo_waits import pending_sends

_OURS = "xfuser_fastcache/"


def renew_channels(board: Board, coordinators: list[Any]) -> None:
    """Put new groups in the place of all gloo groups of several ranks; a collective call.

    Groups of NCCL stay as they are: there, a wait that passes its limit ends the process.

    Args:
        board: of the ranks that have met.
        coordinators: of xfuser, in one order on all ranks.

    Raises:
        RuntimeError: a rank has failed since the meeting.
    """
    from yunchang.globals import PROCESS_GROUP

    made: dict[Any, Any] = {}
    for kind, coordinator in enumerate([*coordinators, PROCESS_GROUP]):
        for name, value in vars(coordinator).items():
            held = value if isinstance(value, list) else [value]
            for index, group in enumerate(held):
                if _is_to_be_renewed(group) and group not in made:
                    made[group] = _renewed(group, f"{kind}/{name}/{index}", board)
            if any(_is_known(group, made) for group in held):
                new = [made.get(group, group) for group in held]
                setattr(coordinator, name, new if isinstance(value, list) else new[0])
        if hasattr(coordinator, "reset_buffer"):
            coordinator.reset_buffer()
    pending_sends.forget()
    for group in made:
        # xfuser's own first ones may be held elsewhere; each of ours has sockets and threads.
        if group.group_name.startswith(_OURS):
            dist.destroy_process_group(group)


def _is_to_be_renewed(group: Any) -> bool:
    return (
        isinstance(group, dist.ProcessGroup)
        and group.size() > 1
        and dist.get_backend(group) == "gloo"
    )


def _is_known(group: Any, made: dict[Any, Any]) -> bool:
    return isinstance(group, dist.ProcessGroup) and group in made


def _renewed(group: Any, place: str, board: Board) -> Any:
    """Return a new group of the same ranks."""
    ranks = dist.get_process_group_ranks(group)
    name = f"{_OURS}{board.ranks}/{board.name}/{place}/{ranks}"
    # Not `dist.new_group`: that has all ranks of the world take part.
    made, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(board.rank),
        ranks,
        dist.Backend("gloo"),
        board.store("channels"),
        group_name=name,  # type: ignore[arg-type]
        timeout=timedelta(seconds=board.timeout_s),
    )
    places = {rank: index for index, rank in enumerate(ranks)}
    distributed_c10d._world.pg_group_ranks[made] = places
    return made

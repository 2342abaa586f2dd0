"""One rank of plain torch.distributed (no xfuser) in every case of the consensus protocol."""

from __future__ import annotations

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

from xfuser_fastcache.consensus.collective import (  # noqa: E402
    BlockList,
    Consensus,
)
from xfuser_fastcache.consensus.errors import ConsensusError  # noqa: E402
from xfuser_fastcache.consensus.header import Header  # noqa: E402
from xfuser_fastcache.consensus.topology import DecisionGroup, PlainLayout  # noqa: E402
from xfuser_fastcache.consensus.transfer import HostCopy  # noqa: E402
from xfuser_fastcache.measurements.moments import SLOTS, Moments, Reference, measure  # noqa: E402

EXPONENT = 5
# How 13 tokens lie on 4 ranks: tokens in another order, on other ranks, in shards of other sizes.
SHARDINGS = {
    "even": [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]],
    "ranks permuted": [[10, 11, 12], [7, 8, 9], [0, 1, 2, 3], [4, 5, 6]],
    "uneven": [[0], [1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11], [12]],
    "an empty shard": [[], [12, 0, 1, 2, 3], [4, 5, 6, 7], [11, 10, 9, 8]],
    "tokens permuted": [[12, 3, 5], [0, 9, 1, 2], [4, 6, 8, 7], [10, 11]],
}


def make(group: DecisionGroup | None = None, **changes: Any) -> Consensus:
    arguments: dict[str, Any] = {
        "backend": "gloo",
        "timeout_s": 20.0,
        "config_digest": 7,
        "block_lists": (BlockList(4, 100), BlockList(8, 50)),
    }
    return Consensus(group or PlainLayout().decision_group(), **{**arguments, **changes})


def raised(function: Any, *arguments: Any, **named: Any) -> str:
    try:
        function(*arguments, **named)
    except ConsensusError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def round_trip(consensus: Consensus, header: Header, moments: torch.Tensor) -> list[list[int]]:
    return consensus.wait(consensus.post(header, moments))


def sharded_sums(consensus: Consensus, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Reduce the same tokens in every sharding."""
    noise = torch.Generator().manual_seed(3)
    before = torch.randn(2, 13, 96, generator=noise).to(dtype)
    now = before + 0.1 * torch.randn(2, 13, 96, generator=noise).to(dtype)
    sums = {"one process": measure(now, Reference.of(before), EXPONENT).tolist()}
    for step, (name, shards) in enumerate(SHARDINGS.items()):
        own = shards[rank]
        moments = measure(now[:, own], Reference.of(before[:, own]), EXPONENT)
        (sums[name],) = round_trip(consensus, Header(0, step, 0, 0), moments[None])
    return sums


def main() -> None:
    """Run the cases in one world of four ranks and report."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    consensus = make()
    found["float32"] = sharded_sums(consensus, rank, torch.float32)
    found["bfloat16"] = sharded_sums(consensus, rank, torch.bfloat16)

    x = torch.ones(1, 2, 8)
    if rank == 2:
        x[0, 1, 3] = float("nan")
    if rank == 3:
        x *= 1e9
    (reduced,) = round_trip(consensus, Header(1, 0, 0, 0), measure(x, Reference.of(x), 0)[None])
    broken = Moments.decode(reduced, 0)
    found["broken"] = [broken.nonfinite, broken.overflow, broken.tokens, reduced]

    # Ranks at different places: all of them raise, at that very collective.
    zeros = torch.zeros(1, SLOTS, dtype=torch.int64)
    places = {
        "generation": Header(2 + (rank == 1), 0, 0, 0),
        "step": Header(2, 4 + (rank == 3), 0, 0),
        "branch": Header(2, 4, int(rank == 0), 0),
        "digest": Header(2, 4, 0, 100 + rank % 2),
        "setup": Header(2, 4, 0, 0, f"batch {1 + (rank == 2)}"),
        # Equal sums, so that only the squares show it.
        "squares": Header(2, (3, 5, 4, 4)[rank], 0, 0),
    }
    found["places"] = {
        name: raised(round_trip, consensus, header, zeros) for name, header in places.items()
    }
    # Two ranks take that vector later than the others wait for their words, as stages may.
    ticket = consensus.post(Header(3, int(rank == 0), 0, 0), zeros)
    if rank > 1:
        consensus.gather([rank], "after the others")
    found["unheard"] = raised(consensus.wait, ticket)
    if rank < 2:
        consensus.gather([rank], "after the others")
    found["after"] = round_trip(consensus, Header(9, 0, 0, 0), zeros + rank)

    # Async: posted in order, awaited later, as a pipeline does.
    tickets = [consensus.post(Header(9, step, 0, 0), zeros + step) for step in range(1, 4)]
    found["async"] = [consensus.wait(ticket)[0][0] for ticket in tickets]
    found["collectives"] = consensus.collectives

    # One rank's device is late, so that its vectors have yet to leave when the next is posted.
    arrived = HostCopy.arrived
    HostCopy.arrived = property(lambda _: rank != 1)
    tickets = [consensus.post(Header(9, step, 0, 0), zeros + rank + step) for step in (4, 5)]
    rows = consensus.gather([rank], "a row")
    found["late"] = [list(rows.values()), *(consensus.wait(ticket)[0][0] for ticket in tickets)]
    HostCopy.arrived = arrived
    consensus.close()

    found["options"] = raised(make, config_digest=7 + (rank == 2))
    found["model"] = raised(make, block_lists=(BlockList(4 + (rank == 1), 100),))

    # Replicas decide on their own: each makes its group without the other, and at its own time.
    half = (0, 1) if rank < 2 else (2, 3)
    if rank < 2:
        time.sleep(2)
    replica = make(DecisionGroup(half, rank))
    steps = 3 if rank < 2 else 7
    sums = [
        round_trip(replica, Header(0, step, 0, 0), zeros + (1 if rank < 2 else 100))[0][0]
        for step in range(steps)
    ]
    found["replica"] = sums
    replica.close()
    dist.barrier()

    # A pipeline: each stage fills its own groups and all learn all block lists.
    stage = rank // 2
    lists = (
        (BlockList(4, 100), BlockList(2, 50)) if stage == 0 else (BlockList(0, 0), BlockList(6, 50))
    )
    pipeline = make(DecisionGroup((0, 1, 2, 3), rank, stage=stage, stages=2), block_lists=lists)
    found["stages"] = [[part.blocks for part in held] for held in pipeline.stages]
    pipeline.close()

    gathered = make()
    found["gather"] = gathered.gather([rank, rank * rank], "a test")
    gathered.close()

    # A rank that never arrives, last, since it breaks the group.
    lonely = make(timeout_s=3.0)
    started = time.perf_counter()
    if rank == 3:
        time.sleep(16)
    else:
        found["absent"] = raised(round_trip, lonely, Header(5, 6, 1, 0), zeros)
        found["absent_s"] = time.perf_counter() - started
        started = time.perf_counter()
        found["alone"] = raised(make, timeout_s=4.0)
        found["alone_s"] = time.perf_counter() - started
    report(rank, **found)
    sys.stdout.flush()
    # The group is broken on purpose; leaving in order is not possible any more.
    time.sleep(1 if rank == 3 else 12)
    os._exit(0)


if __name__ == "__main__":
    main()

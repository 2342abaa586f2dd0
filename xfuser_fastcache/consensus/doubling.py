"""A sum over all ranks in as few rounds of messages as possible, for those who wait for it.

A short vector costs what its messages wait for each other. gloo's all-reduce sends it around a
ring, twice: `2 (n - 1)` messages one after the other. Here it is `ceil(log2 n)` for any number of
ranks. The price is that a rank moves on only while it waits, so what nobody waits for stays with
gloo, whose threads carry it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

# What is sent, to which rank, and from which one as much is received and returned.
Exchange = Callable[[torch.Tensor, int, int], torch.Tensor]


def doublings(ranks: int) -> int:
    """Return the rounds of messages that a sum takes.

    Example:
        >>> [doublings(ranks) for ranks in (1, 2, 3, 8, 9, 1024)]
        [0, 1, 2, 3, 4, 10]
    """
    return (ranks - 1).bit_length()


def sum_of_all(own: torch.Tensor, rank: int, ranks: int, exchange: Exchange) -> torch.Tensor:
    """Return the sum of the vectors of all ranks; every rank calls it.

    A rank knows the sum of `step` ranks from its own on (the window), and with the one from the
    rank that lies so far ahead that of twice as many. Numbers of ranks that are no power of two are
    put together as their binary digits say: of the last `ranks % step` of the ranks ahead it knows
    the sum, too (the part), and a window in front of that makes the next.

    Args:
        own: this rank's, integers, so that the order of summing does not matter.
        rank: this one.
        ranks: their number.
        exchange: sends and receives; see `Exchange`.
    """
    window, part = own, torch.zeros_like(own)
    for doubling in range(doublings(ranks)):
        step = 1 << doubling
        sent = torch.stack((window, part))
        ahead, part_ahead = exchange(sent, (rank - step) % ranks, (rank + step) % ranks)
        if ranks & step:
            part = window + part_ahead
        window = window + ahead
    return window if ranks == 1 << doublings(ranks) else part


def reduce_at_once(vector: torch.Tensor, group: Any, timeout_s: float) -> torch.Tensor:
    """Return the sum of all ranks' vectors over a gloo group, and wait for it.

    Args:
        vector: of this rank, on the host.
        group: a `ProcessGroupGloo`.
        timeout_s: longest wait for the others in all, in seconds.

    Raises:
        RuntimeError: of torch, where a rank does not arrive.
    """
    ends = time.monotonic() + timeout_s
    # gloo forgets a send whose work is collected, and reads what is sent until it is done.
    sends: list[tuple[Any, torch.Tensor]] = []

    def finish(work: Any) -> None:
        work.wait(timedelta(seconds=max(ends - time.monotonic(), 1e-3)))

    def exchange(numbers: torch.Tensor, to: int, source: int) -> torch.Tensor:
        received = torch.empty_like(numbers)
        work = group.recv([received], source, 0)
        sends.append((group.send([numbers], to, 0), numbers))
        finish(work)
        return received

    total = sum_of_all(vector, group.rank(), group.size(), exchange)
    for work, _ in sends:
        finish(work)
    return total

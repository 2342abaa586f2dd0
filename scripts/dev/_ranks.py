"""Ranks of a small world on this machine: forked from a process that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 300.0


def run_ranks(ranks: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    """Return what a function returned on each of some ranks of plain torch.distributed, over gloo.

    Args:
        ranks: to start.
        function: of `given`; runs where the default group is there, on one thread.
        *given: its arguments.

    Raises:
        RuntimeError: a rank failed, or returned nothing within `LIMIT_S`; the others are ended.
    """
    forks = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    done: Any = forks.Queue()
    processes = [
        forks.Process(target=_rank, args=(rank, ranks, port, done, function, given))
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        # Begun after the forks, which must not have its threads.
        store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        found: dict[int, Any] = {}
        ends = time.monotonic() + LIMIT_S
        while len(found) < ranks:
            try:
                rank, value = done.get(timeout=0.5)
            except queue.Empty:
                failed = [rank for rank, process in enumerate(processes) if process.exitcode]
                if failed or time.monotonic() > ends:
                    missing = sorted(set(range(ranks)) - set(found))
                    raise RuntimeError(
                        f"ranks {missing} returned nothing; failed: {failed}"
                    ) from None
            else:
                found[rank] = value
        for process in processes:
            process.join(LIMIT_S)
        del store
    finally:
        for process in processes:
            process.terminate()
    return [found[rank] for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, port: int, done: Any, function: Callable[..., Any], given: Any
) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, timeout=timedelta(seconds=LIMIT_S))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    done.put((rank, function(*given)))
    dist.barrier()  # nobody leaves before all have read what they were sent
    done.close()
    done.join_thread()
    os._exit(0)

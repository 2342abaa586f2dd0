"""What one consensus costs: the reduction of its vector, and its way to the host.

Runs in processes of its own (`python -m xfuser_fastcache.benchmarks.gpu.wire`), so that a wire that
hangs is ended, and no process group stays behind.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from xfuser_fastcache.benchmarks.gpu.record import Figures, LeftOut

# int64 numbers: a header of 8, and the 6 moments of one group.
LENGTH = 14
LIMIT_S = 90.0


def consensus_cost(backend: str, repeat: int) -> Figures:
    """Return microseconds of a round: NCCL with one rank, or gloo with two on this machine.

    Args:
        backend: "nccl" or "gloo".
        repeat: rounds whose median counts.
    """
    if backend == "nccl" and not torch.cuda.is_available():
        raise LeftOut("needs a GPU")
    world = 1 if backend == "nccl" else 2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __spec__.name, backend, f"{folder}/store", str(repeat)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(world)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                # Without a network, a machine's own name leads nowhere.
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"},
            )
            for rank in range(world)
        ]
        try:
            ends = time.monotonic() + LIMIT_S
            printed = [rank.communicate(timeout=ends - time.monotonic())[0] for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{backend} did not finish within {LIMIT_S:.0f} s") from error
        finally:
            for rank in ranks:
                rank.kill()
    for rank, text in zip(ranks, printed, strict=True):
        if rank.returncode:
            raise RuntimeError(f"a rank of {backend} ended with {rank.returncode}: {text[-1500:]}")
    # Warnings of the wire may stand around it.
    (line,) = [line for line in printed[0].splitlines() if line.startswith("{")]
    return {"ranks": world, **json.loads(line)}


def _median_us(call: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat + 10):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e6)
    return median(times[10:])


def _rank(backend: str, store: str, repeat: int, rank: int, world: int) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{Path(store)}", rank=rank, world_size=world
    )
    on_device = torch.arange(LENGTH, dtype=torch.int64, device=device)
    on_host = torch.arange(LENGTH, dtype=torch.int64)

    def reduce_on_device() -> object:
        vector = on_device.clone()
        dist.all_reduce(vector)
        return vector.tolist()

    def reduce_on_host() -> object:
        vector = on_host.clone()
        dist.all_reduce(vector)
        return vector.tolist()

    def from_device_over_host() -> object:
        vector = on_device.to("cpu")
        dist.all_reduce(vector)
        return vector.tolist()

    found: dict[str, float] = {}
    if backend == "nccl":
        found["all_reduce_and_copy_us"] = _median_us(reduce_on_device, repeat)
        found["copy_us"] = _median_us(lambda: on_device.clone().tolist(), repeat)
    else:
        found["all_reduce_us"] = _median_us(reduce_on_host, repeat)
        if cuda:
            found["copy_and_all_reduce_us"] = _median_us(from_device_over_host, repeat)
    dist.barrier()
    if rank == 0:
        print(json.dumps({"length": LENGTH, "repeat": repeat, **found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    flags = argparse.ArgumentParser()
    flags.add_argument("backend")
    flags.add_argument("store")
    flags.add_argument("repeat", type=int)
    flags.add_argument("rank", type=int)
    flags.add_argument("world", type=int)
    given = flags.parse_args()
    _rank(given.backend, given.store, given.repeat, given.rank, given.world)

"""Cells that all ranks measure together: outcomes meet on rank 0, and no wait is without an end."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from xfuser_fastcache.benchmarks.gpu.record import ERROR, LEFT_OUT, OK, without_folders
from xfuser_fastcache.xdit.cpu_platform import host_world_group

REFUSED = "refused"
# Exit status of a process that was ended by its time.
ENDED = 3


@dataclass
class Outcome:
    """What one rank has to say about a cell.

    Attributes:
        status: `OK`, `REFUSED` or `ERROR`.
        reason: message or traceback; None where it is `OK`.
        value: what the cell returned.
    """

    status: str = OK
    reason: str | None = None
    value: Any = field(default=None, repr=False)


class Together:
    """Runs cells on all ranks, and ends the process when its time is up.

    A rank that fails alone leaves the others waiting for it, perhaps inside NCCL, where nothing of
    Python runs. So threads watch the time, and on rank 0 whether a cell goes on after a failure.

    Args:
        limit_s: seconds from now until the process is ended.
        on_end: called on rank 0 with a status and a reason before that; it has to write what
            there is.
        patience_s: seconds for a cell to end on all ranks, once it has failed on one.
    """

    def __init__(
        self, limit_s: float, on_end: Callable[[str, str], None], patience_s: float = 30.0
    ):
        self.ends_at = time.monotonic() + limit_s
        self.patience_s = patience_s
        self._on_end = on_end
        self._cell = ""
        self._closed = threading.Event()
        # Apart from the other thread, which asks a store that may keep it waiting.
        for task in (self._watch_time, self._listen):
            threading.Thread(target=task, name="fastcache-fieldtest", daemon=True).start()

    @property
    def left_s(self) -> float:
        """Seconds left, as rank 0's clock has it."""
        return self.ends_at - time.monotonic()

    def agreed(self, mine: Any) -> Any:
        """Return rank 0's value on every rank."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return mine
        held = [mine]
        dist.broadcast_object_list(held, src=0, group=host_world_group())
        return held[0]

    def run(self, cell: str, function: Callable[[], Any]) -> list[Outcome]:
        """Run a cell on this rank, and return every rank's outcome, also where one is an error.

        Args:
            cell: name of it, of which no other has the same.
            function: measures. A `ValueError`, `TypeError` or `NotImplementedError` that this
                package raises is a refusal, everything else an error.
        """
        self._cell = cell
        try:
            outcome = Outcome(value=function())
        except Exception as error:
            if _is_refusal(error):
                outcome = Outcome(REFUSED, " ".join(str(error).split()))
            else:
                outcome = Outcome(ERROR, without_folders(traceback.format_exc(limit=-6)))
        outcomes = [outcome]
        if dist.is_initialized() and dist.get_world_size() > 1:
            if outcome.reason is not None:
                said = json.dumps([outcome.status, outcome.reason])
                _store().set(_key(cell, dist.get_rank()), said)
            held: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(held, outcome, group=host_world_group())
            outcomes = held
        self._cell = ""
        return outcomes

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch_time(self) -> None:
        if not self._closed.wait(max(self.left_s, 0.0)):
            self._end(LEFT_OUT, "the budget was spent")

    def _listen(self) -> None:
        heard: tuple[str, str, str] | None = None
        since = 0.0
        while not self._closed.wait(0.5):
            failed = self._failed()
            if failed != heard:
                heard, since = failed, time.monotonic()
            elif heard is not None and time.monotonic() - since > self.patience_s:
                self._end(heard[1], f"{heard[2]}\nThe other ranks waited for it.")

    def _failed(self) -> tuple[str, str, str] | None:
        """Return the cell that is running, with status and reason of a rank that failed in it."""
        cell = self._cell
        if not cell or not dist.is_initialized() or dist.get_rank() != 0:
            return None
        for rank in range(dist.get_world_size()):
            key = _key(cell, rank)
            if _store().check([key]):
                status, reason = json.loads(_store().get(key))
                return cell, status, f"rank {rank}: {reason}"
        return None

    def _end(self, status: str, reason: str) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            self._on_end(status, reason)
        else:
            # Rank 0 writes first: torchrun ends all ranks with the first of them.
            time.sleep(5.0)
        os._exit(ENDED)


def _is_refusal(error: Exception) -> bool:
    innermost = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        innermost = frame
    module = "" if innermost is None else innermost.f_globals.get("__name__", "")
    return isinstance(error, (ValueError, TypeError, NotImplementedError)) and module.split(".")[
        0
    ] in ("xfuser_fastcache", "diffusers_adapters")


def _key(cell: str, rank: int) -> str:
    return f"fastcache fieldtest/{cell}/{rank}"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()

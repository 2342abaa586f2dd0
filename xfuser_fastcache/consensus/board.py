"""The board: what the ranks of a group leave for each other in torch's store.

Where each rank stands, how it failed, and rows that all are to read. Nothing here is a collective,
so that a rank that has gone astray can still be told from one that is late.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from xfuser_fastcache.consensus.errors import ConsensusError, ConsensusTimeout

_FAILED = "failed"
_MET = "met"
_POLL_S = 0.02
# Rows that a rank leaves up: a slow one may still read what was posted before the last.
_ROWS_KEPT = 8
# How long ranks whose waits end in vain give each other to say so.
_GRACE_S = 3.0


class Board:
    """A place in the store for one group of ranks, from the meeting on that opens it.

    Args:
        ranks: global ranks of the group, in order.
        rank: this one.
        timeout_s: longest wait for the others, in seconds.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, timeout_s: float):
        self.ranks = ranks
        self.rank = rank
        self.timeout_s = timeout_s
        self.name = ""
        self._sequence = 0
        # Where this rank has failed itself: what others left up to there it knows of.
        self._failed_at = -1
        self._posted = 0
        self._own_rows: list[str] = []
        self._group = dist.PrefixStore(
            f"xfuser_fastcache/{'-'.join(map(str, ranks))}",
            dist.distributed_c10d._get_default_store(),
        )
        self._store = self._group

    def store(self, name: str) -> Any:
        """Return a part of the store that this meeting's ranks alone use."""
        return dist.PrefixStore(name, self._store)

    def meet(self, row: Any, what: str) -> dict[int, Any]:
        """Wait until every rank is here; return what each has brought.

        A round of meetings ends for all ranks or for none: one that was waited for in vain is
        closed, and who comes later opens the next. So ranks meet again whatever each of them has
        tried alone before.

        Args:
            row: what this rank brings; anything that JSON holds.
            what: the meeting, for messages.

        Raises:
            ConsensusTimeout: a rank did not come within `timeout_s`.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            number = self._open_round()
            keys = {rank: f"{number}/row/{rank}" for rank in self.ranks}
            end = f"{number}/end"
            self._group.set(keys[self.rank], json.dumps(row))
            self._wait_for_all(keys, end, deadline)
            here = self._group.check(list(keys.values()))
            if self._group.compare_set(end, "", _MET if here else "in vain").decode() == _MET:
                self.name = str(number)
                self._store = dist.PrefixStore(self.name, self._group)
                return {rank: json.loads(self._group.get(key)) for rank, key in keys.items()}
            if time.monotonic() > deadline:
                late = [rank for rank, key in keys.items() if not self._group.check([key])]
                raise self.missing(what, dict.fromkeys(late, "never seen"))

    def _open_round(self) -> int:
        """Return the number of the first round that has not ended."""
        while True:
            number = int(self._group.compare_set("round", "", "1"))
            if not self._group.check([f"{number}/end"]):
                return number
            self._group.compare_set("round", str(number), str(number + 1))

    def _wait_for_all(self, keys: dict[int, str], end: str, deadline: float) -> None:
        wanted, group = list(keys.values()), self._group
        _poll(lambda: group.check(wanted) or group.check([end]), deadline)

    # ---- where ranks stand -------------------------------------------------------------------

    def arrive(self, what: str) -> None:
        """Leave word of where this rank is, for those who might wait for it in vain."""
        self._sequence += 1
        self._store.set(str(self.rank), f"{self._sequence}|{what}")

    def fail(self, what: str) -> None:
        """Leave word that this rank will not come to where the others wait for it next.

        Of what others failed at up to here, nothing is heard any more: where all have failed
        together, the next generation must not end with the errors of the last one.
        """
        self._failed_at = self._sequence
        self._store.set(str(self.rank), f"{self._sequence}|{_FAILED} at {what}")

    def absent(self) -> dict[int, str]:
        """Return the ranks that are behind this one, with the last place they were seen at."""
        behind = {}
        for rank in self.ranks:
            key = str(rank)
            if not self._store.check([key]):
                behind[rank] = "never seen"
                continue
            sequence, what = self._store.get(key).decode().split("|", 1)
            failed = what.startswith(_FAILED) and int(sequence) > self._failed_at
            if int(sequence) < self._sequence + failed and rank != self.rank:
                behind[rank] = what if failed else f"last seen at {what}"
        return behind

    def check(self, what: str) -> None:
        """Raise where a rank that is behind this one has left word that it has failed.

        Raises:
            ConsensusError: it names the rank and its error.
        """
        behind = self.absent()
        failed = {rank: where for rank, where in behind.items() if where.startswith(_FAILED)}
        if failed:
            raise ConsensusError(
                f"rank {self.rank} waited at {what} in vain: "
                + "; ".join(f"rank {rank} {where}" for rank, where in failed.items())
            )

    def let_others_say(self, what: str) -> dict[int, str]:
        """Say that this rank has waited in vain, and give others like it a moment to say so.

        Returns:
            The ranks that have not; where all have in the end, those that came late to it.
        """
        self.arrive(f"{what}, waiting in vain")
        grace_s = min(_GRACE_S, self.timeout_s)
        time.sleep(grace_s / 10)
        late = dict.fromkeys(self.absent(), "late")
        time.sleep(grace_s * 9 / 10)
        return self.absent() or late

    def missing(
        self, what: str, absent: dict[int, str] | None = None, cause: BaseException | None = None
    ) -> ConsensusTimeout:
        """Return the error of a wait in vain; it names who is absent."""
        found = self.absent() if absent is None else absent
        who = "; ".join(f"rank {rank} ({where})" for rank, where in found.items())
        others = [rank for rank in self.ranks if rank != self.rank]
        who = who or f"nobody; a connection to one of ranks {others} broke"
        return ConsensusTimeout(
            f"rank {self.rank} waited at {what} for the decision group {list(self.ranks)}, at most "
            f"sync_timeout_s={self.timeout_s:g} s. "
            f"Did not arrive: {who}. Cause: {cause or 'time over'}"
        )

    # ---- rows --------------------------------------------------------------------------------

    def post(self, row: Any, what: str) -> str:
        """Leave a row for the others; return the key to take all ranks' rows by.

        Args:
            row: anything that JSON holds.
            what: the row; ranks post the same ones in the same order.
        """
        self._posted += 1
        key = f"{what} ({self._posted})"
        self.arrive(what)
        self.leave(key, row)
        if len(self._own_rows) > _ROWS_KEPT:
            self._store.delete_key(self._own_rows.pop(0))
        return key

    def leave(self, key: str, row: Any) -> None:
        """Leave a row by a key that all ranks know."""
        self._own_rows.append(f"{key}/{self.rank}")
        self._store.set(self._own_rows[-1], json.dumps(row))

    def take(
        self, key: str, grace_s: float | None = None, ranks: tuple[int, ...] | None = None
    ) -> dict[int, Any]:
        """Return the rows of a key by rank, once all are there.

        Args:
            key: by `post`.
            grace_s: longest wait where those that are missing by then may be left out; default is
                to wait for all of them.
            ranks: whose rows; default all.

        Raises:
            ConsensusTimeout: a rank did not post its row within `timeout_s`.
            ConsensusError: a rank has left word that it has failed.
        """
        ranks = ranks or self.ranks
        keys = {rank: f"{key}/{rank}" for rank in ranks}
        limit = self.timeout_s if grace_s is None else min(grace_s, self.timeout_s)

        def complete() -> bool:
            if self._store.check(list(keys.values())):
                return True
            if grace_s is None:
                self.check(key)
            return False

        if not _poll(complete, time.monotonic() + limit):
            keys = {rank: own for rank, own in keys.items() if self._store.check([own])}
            if grace_s is None:
                late = {rank: "no row" for rank in ranks if rank not in keys}
                raise self.missing(key, late)
        return {rank: json.loads(self._store.get(own)) for rank, own in keys.items()}


def _poll(done: Callable[[], bool], deadline: float) -> bool:
    """Return whether something comes true before a deadline of the monotonic clock."""
    pause = _POLL_S / 16
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _POLL_S)
    return True

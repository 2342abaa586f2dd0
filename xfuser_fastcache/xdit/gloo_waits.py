"""Sends and receives of gloo: kept alive until they are done, and no longer than a limit.

gloo's `wait()` ignores the timeout of its group, so each wait here brings its own. Who waits in
vain says for whom.
"""

from __future__ import annotations

import queue
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from xfuser_fastcache.consensus.collective import ConsensusTimeout

# Longest wait for a peer where nobody has set a limit: torch's own for gloo.
_UNLIMITED_S = 1800.0


class WaitLimit:
    """The longest wait for a peer, in seconds; one for the process, as xfuser's groups are.

    Attributes:
        seconds: changed by `sync_timeout_s`.
    """

    def __init__(self) -> None:
        self.seconds = _UNLIMITED_S

    def passed(self, what: str, peer: int, cause: Exception | None = None) -> ConsensusTimeout:
        """Return the error of a wait that has passed the limit."""
        return ConsensusTimeout(
            f"rank {dist.get_rank()} waited for {what} rank {peer}, a neighbour in the pipeline, "
            f"at most sync_timeout_s={self.seconds:g} s. It is late, has failed, or runs another "
            f"generation: look at its log. Cause: {cause or 'it did not take the message'}"
        )


wait_limit = WaitLimit()


class LimitedReceive:
    """A receive in flight; stands in for its `Work`.

    Args:
        work: of torch.
        source: global rank that sends.
    """

    def __init__(self, work: Any, source: int):
        self.work = work
        self.source = source

    def wait(self) -> bool:
        """Return when the message is there.

        Raises:
            ConsensusTimeout: it did not come within the limit; names the sender.
        """
        try:
            return self.work.wait(timedelta(seconds=wait_limit.seconds))
        except RuntimeError as error:
            raise wait_limit.passed("a message of", self.source, error) from error


class KeptSend:
    """A send in flight with the tensor it reads; stands in for its `Work`."""

    def __init__(self, work: Any, tensor: torch.Tensor, peer: int):
        self.work = work
        self.tensor = tensor
        self.peer = peer
        self.error: Exception | None = None
        self.done = threading.Event()

    def wait(self) -> bool:
        """Return when the peer has taken the message.

        Raises:
            ConsensusTimeout: it did not within the limit; names it.
        """
        if not self.done.wait(wait_limit.seconds):
            raise wait_limit.passed("a message to be taken by", self.peer)
        if self.error is not None:
            raise self.error
        return True


class PendingSends:
    """Keeps sends alive until their peer has taken them, and no longer.

    gloo forgets a send whose `Work` is collected, and a gloo send's ``is_completed()`` stays False
    until its ``wait()`` returns, while a second ``wait()`` never does. So one thread waits for
    each of them, once, and everybody else waits for that thread.
    """

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[KeptSend] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def keep(self, work: Any, tensor: torch.Tensor, peer: int) -> KeptSend:
        """Own ``work`` and ``tensor`` until the send completes; return what to wait on."""
        if self._error is not None:
            raise RuntimeError(f"an earlier send to a peer failed: {self._error}") from self._error
        kept = KeptSend(work, tensor, peer)
        with self._changed:
            self._count += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._wait_in_turn, daemon=True)
                self._thread.start()
        self._waiting.put(kept)
        return kept

    def drain(self, timeout_s: float) -> None:
        """Return when nothing is pending; raise what a send raised, or `TimeoutError`."""
        with self._changed:
            empty = self._changed.wait_for(lambda: self._count == 0, timeout_s)
        if self._error is not None:
            raise RuntimeError(f"a send to a peer failed: {self._error}") from self._error
        if not empty:
            raise TimeoutError(
                f"{self._count} sends were not received within {timeout_s} s; the next pipeline "
                "stage stopped early or is slow. Look at its log, or allow more time."
            )

    def _wait_in_turn(self) -> None:
        while True:
            kept = self._waiting.get()
            try:
                kept.work.wait()
            except Exception as error:  # handed to whoever waits or sends next
                kept.error = self._error = error
            del kept.work, kept.tensor
            kept.done.set()
            del kept  # else the last one lives until the next arrives
            with self._changed:
                self._count -= 1
                self._changed.notify_all()


pending_sends = PendingSends()

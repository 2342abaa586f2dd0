"""Sends and receives of gloo: kept alive until they are done, and no longer than a limit.

gloo's `wait()` ignores the timeout of its group, so each wait here brings its own. Who waits in
vain says for whom.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from xfuser_fastcache.consensus.errors import ConsensusTimeout

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
            "generation (size, batch or steps): look at its log. "
            f"Cause: {cause or 'it did not take the message'}"
        )


wait_limit = WaitLimit()


def tag_of(tensor: torch.Tensor) -> int:
    """Return the tag of a message, by its shape and dtype.

    gloo ends the process where a message is longer than what it is received into. With a tag such
    a message, of another generation, is not received at all, and the wait for the right one ends.
    """
    return zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode()) & 0x7FFFFFFF


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
        self._changed = threading.Condition()
        self._waiting: queue.SimpleQueue[KeptSend] = queue.SimpleQueue()
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
                self._thread = threading.Thread(
                    target=self._wait_in_turn, args=(self._waiting,), daemon=True
                )
                self._thread.start()
            self._waiting.put(kept)
        return kept

    def forget(self) -> None:
        """Await none of what is pending: its channels are given up, and a peer may never take it.

        The thread that waits for it stays behind with what it holds.
        """
        with self._changed:
            self._waiting, self._thread = queue.SimpleQueue(), None
            self._error, self._count = None, 0

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

    def _wait_in_turn(self, waiting: queue.SimpleQueue[KeptSend]) -> None:
        while True:
            kept = waiting.get()
            try:
                kept.work.wait()
            except Exception as error:  # handed to whoever waits or sends next
                kept.error = error
            failure = kept.error
            del kept.work, kept.tensor
            kept.done.set()
            del kept  # else the last one lives until the next arrives
            with self._changed:
                if waiting is self._waiting:  # else it was given up
                    self._error = failure or self._error
                    self._count -= 1
                    self._changed.notify_all()


pending_sends = PendingSends()


def _direction(coordinator: Any, place: int) -> Any:
    """Return the group of what the rank at a place sends; two stages have one a direction."""
    two = coordinator.world_size == 2
    return coordinator.device_groups[place % 2] if two else coordinator.device_group


def _isend(self: Any, tensor: torch.Tensor) -> KeptSend:
    return send(tensor, self.next_rank, _direction(self, self.rank_in_group))


def _irecv(self: Any, tensor: torch.Tensor) -> LimitedReceive:
    return receive(tensor, self.prev_rank, _direction(self, self.rank_in_group + 1))


def _isend_skip(self: Any, tensor: torch.Tensor) -> KeptSend:
    return send(tensor, self.skip_rank, self.skip_device_group)


def _irecv_skip(self: Any, tensor: torch.Tensor) -> LimitedReceive:
    return receive(tensor, self.skip_rank, self.skip_device_group)


def send(tensor: torch.Tensor, peer: int, group: Any) -> KeptSend:
    """Send a tensor to a neighbour in the pipeline, and keep it until it is taken."""
    work = dist.isend(tensor, dst=peer, group=group, tag=tag_of(tensor))
    return pending_sends.keep(work, tensor, peer)


def receive(tensor: torch.Tensor, peer: int, group: Any) -> LimitedReceive:
    """Receive a tensor from a neighbour in the pipeline."""
    work = dist.irecv(tensor, src=peer, group=group, tag=tag_of(tensor))
    return LimitedReceive(work, peer)


# Methods of xfuser's coordinator of a pipeline -> what they are on gloo.
PIPELINE: dict[str, Callable[..., Any]] = {
    "_pipeline_isend": _isend,
    "_pipeline_irecv": _irecv,
    "_pipeline_isend_skip": _isend_skip,
    "_pipeline_irecv_skip": _irecv_skip,
}

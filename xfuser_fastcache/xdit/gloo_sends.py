"""Keeps asynchronous gloo sends alive until they are received, and no longer."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch


class KeptSend:
    """A send in flight with the tensor it reads; stands in for its `Work`."""

    def __init__(self, work: Any, tensor: torch.Tensor):
        self.work = work
        self.tensor = tensor
        self.error: Exception | None = None
        self.done = threading.Event()

    def wait(self) -> bool:
        """Return when the peer has taken the message."""
        self.done.wait()
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

    def keep(self, work: Any, tensor: torch.Tensor) -> KeptSend:
        """Own ``work`` and ``tensor`` until the send completes; return what to wait on."""
        if self._error is not None:
            raise RuntimeError(f"an earlier send to a peer failed: {self._error}") from self._error
        kept = KeptSend(work, tensor)
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

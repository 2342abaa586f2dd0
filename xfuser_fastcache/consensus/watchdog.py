"""Says who is missing when a wait that is not ours, in attention or between stages, goes on."""

from __future__ import annotations

import logging
import threading
import time

from xfuser_fastcache.consensus.collective import Consensus

logger = logging.getLogger("xfuser_fastcache")


class Watchdog:
    """Logs an error, naming the ranks that are behind, when the next event fails to come.

    It cannot end a wait inside another library; the bound that the layout puts on those waits
    does that. The thread starts with the first expectation and sleeps between events.

    Args:
        timeout_s: longest time between two events, in seconds.
        consensus: knows the ranks that are behind; a group of one rank is not watched.
    """

    def __init__(self, timeout_s: float, consensus: Consensus):
        self.timeout_s = timeout_s
        self.consensus = consensus
        self._deadline: float | None = None
        self._place = ""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, place: str) -> None:
        """Expect another event within `timeout_s`; `place` is where this rank is now."""
        self._place = place
        if self.consensus.group.world_size == 1:
            return
        self._deadline = time.monotonic() + self.timeout_s
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="fastcache-watchdog")
            self._thread.daemon = True
            self._thread.start()

    def rest(self) -> None:
        """Expect nothing."""
        self._deadline = None

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.timeout_s / 4)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._deadline = None
                absent = self.consensus.absent()
                who = "; ".join(f"rank {rank} ({where})" for rank, where in absent.items())
                logger.error(
                    "No progress for sync_timeout_s=%g s since %s, unless the generation was "
                    "interrupted on purpose. Ranks behind: %s.",
                    self.timeout_s,
                    self._place,
                    who or "none; look at the slowest communication",
                )

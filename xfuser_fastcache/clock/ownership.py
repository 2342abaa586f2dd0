"""Which thread's generation a cache serves: one at a time, and no thread waits for another."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from xfuser_fastcache.clock.sources import Arrival
from xfuser_fastcache.clock.timeline import Call, Timeline


class TransformerInUse(RuntimeError):
    """A cached transformer was called by a thread whose generation its cache does not serve."""

    def __init__(self, caller: str, serves: str):
        super().__init__(
            f"{caller}, but its cache serves {serves}. A cache holds the state of one generation: "
            "run one generation at a time on a cached transformer, each from beginning to end in "
            "one thread, or give each thread a transformer of its own and cache each of them."
        )


class Ownership:
    """Keeps the generations of several threads apart.

    A thread that begins a generation takes over, since an unfinished one cannot be told from an
    interrupted one; the thread that lost its own gets an error at its next step.

    Args:
        timeline: of the current generation; restarted where another thread takes over.
    """

    def __init__(self, timeline: Timeline):
        self.timeline = timeline
        self._door = threading.Lock()
        self._visitor: threading.Thread | None = None
        self._owner: threading.Thread | None = None
        self._goes_on = False
        # Noise levels at which other threads lost their generation.
        self._lost = weakref.WeakKeyDictionary[threading.Thread, float]()

    @contextmanager
    def visit(self, refused: Callable[[], None]) -> Iterator[None]:
        """Keep other threads out of a forward pass; nobody waits.

        Args:
            refused: called by the thread that is kept out.

        Raises:
            TransformerInUse: another forward pass is under way.
        """
        me = threading.current_thread()
        if not self._door.acquire(blocking=False):
            refused()
            inside = self._visitor.name if self._visitor else "another thread"
            raise TransformerInUse(
                f"thread {me.name!r} called a cached transformer",
                f"a forward pass of thread {inside!r} at this moment",
            )
        try:
            self._visitor = me
            yield
        finally:
            self._door.release()

    def claim(self, arrival: Arrival) -> None:
        """Make this thread the owner of the current generation, or refuse it.

        It begins one where the scheduler has a new plan, and else unless the noise goes on falling
        from where this thread lost its last one, or, having lost none, from where the current one
        stands and has steps to come.

        Args:
            arrival: the forward pass that opens.

        Raises:
            TransformerInUse: it goes on with a generation that is not the current one.
        """
        me = threading.current_thread()
        if me is self._owner:
            return
        reached = self.timeline.reached
        if self._owner is not None:
            lost = self._lost.pop(me, None)
            if lost is not None:
                continues = arrival.noise_level <= lost
            else:
                within = self._goes_on and reached is not None
                continues = within and arrival.noise_level < (reached or 0.0)
            if continues and not self.timeline.replanned(arrival.plan):
                raise TransformerInUse(
                    f"thread {me.name!r} goes on with a generation on a cached transformer",
                    f"the generation of thread {self._owner.name!r}",
                )
            if reached is not None:
                self._lost[self._owner] = reached
        self.timeline.restart()
        self._owner = me

    def note(self, call: Call) -> None:
        """Take in whether the current generation is known to go on after this call."""
        self._goes_on = call.more_steps_follow

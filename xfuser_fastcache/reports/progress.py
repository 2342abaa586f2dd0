"""What runs, how far it is and how long it takes: a bar, lines, JSON, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

STYLES = ("auto", "bar", "lines", "json", "none")
# Seconds from a line to the next; the first and the last one always come.
EVERY_S = 5.0


class Progress:
    """Shows tasks one after another, in one style.

    `lines` and `json` write whole lines without colours or carriage returns, as a log needs them.

    Args:
        style: one of `STYLES`; auto is a bar on a terminal, else lines.
        stream: where it goes; default standard error.

    Example:
        >>> for _ in Progress("lines", sys.stdout).track("ab", "drawing"):
        ...     pass
        drawing: 0 of 2
        drawing: 2 of 2, 0 s
    """

    def __init__(self, style: str = "auto", stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.style = style
        if style == "auto":
            self.style = "bar" if self.stream.isatty() else "lines"

    def task(self, title: str, total: int, skipped: Callable[[], float] | None = None) -> Task:
        """Return a task to be entered.

        Args:
            title: what runs.
            total: steps that it has.
            skipped: says which share of blocks was skipped so far, 0 to 1.
        """
        return Task(self, title, total, skipped)

    def track(self, items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
        """Yield the items, one step each; `total` of them where they have no length."""
        with self.task(title, len(items) if total is None else total) as task:  # type: ignore[arg-type]
            for item in items:
                yield item
                task.update()


class Task:
    """One of the things that run; see `Progress.task`. diffusers' pipelines call `update` too."""

    def __init__(
        self,
        progress: Progress,
        title: str,
        total: int,
        skipped: Callable[[], float] | None,
    ):
        self.progress, self.title, self.total, self.skipped = progress, title, total, skipped
        self.done = 0
        self._began = self._said = 0.0
        self._bar: Any = None

    def __enter__(self) -> Task:
        self._began = time.monotonic()
        if self.progress.style == "bar":
            self._bar = _bar(self.progress.stream)
            self._bar.start()
            self._bar.add_task(self.title, total=self.total, note="")
        self._say(self._began)
        return self

    def __exit__(self, *_: object) -> None:
        self._say(time.monotonic(), ended=True)
        if self._bar is not None:
            self._bar.stop()

    def update(self, steps: int = 1) -> None:
        """Note that so many steps more are done."""
        self.reach(self.done + steps)

    def reach(self, done: int) -> None:
        """Note how many steps are done."""
        # Without news a sign of life is enough.
        wait_s = EVERY_S if done != self.done else 12 * EVERY_S
        self.done = done
        now = time.monotonic()
        if self._bar is not None or now - self._said >= wait_s:
            self._say(now)

    def _say(self, now: float, ended: bool = False) -> None:
        self._said = now
        if self.progress.style == "none":
            return
        spent = now - self._began
        left = spent * (self.total - self.done) / self.done if self.done else None
        share = None if self.skipped is None or not self.done else self.skipped()
        if self._bar is not None:
            note = "" if share is None else f"{share:.0%} skipped"
            self._bar.update(self._bar.task_ids[0], completed=self.done, note=note)
            return
        if self.progress.style == "json":
            said = {"what": self.title, "done": self.done, "of": self.total, "ended": ended}
            said |= {"spent_s": round(spent, 3), "left_s": left and round(left, 3)}
            line = json.dumps(said | ({} if share is None else {"skipped": round(share, 4)}))
        else:
            line = f"{self.title}: {self.done} of {self.total}"
            if self.done or spent >= 1:
                line += f", {spent:.0f} s"
            if left is not None and not ended:
                line += f", about {left:.0f} s left"
            line += "" if share is None else f", {share:.0%} skipped"
        print(line, file=self.progress.stream, flush=True)


def _bar(stream: TextIO) -> Any:
    from rich import progress as rich
    from rich.console import Console

    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(elapsed_when_finished=False),
        rich.TextColumn("{task.fields[note]}"),
        console=Console(file=stream),
        speed_estimate_period=600,
    )

"""What a run has measured so far, on disk after every cell; and how much time is left."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xfuser_fastcache.artifacts.file import replace_file

SCHEMA = 1
OK, ERROR, LEFT_OUT = "ok", "error", "left out"

Figures = dict[str, Any]


class LeftOut(Exception):
    """A cell cannot be measured here; the message says why."""


class BudgetSpent(BaseException):
    """The time is up. No Exception, so that a cell that catches those does not go on."""


class Record:
    """Cells in the order in which they were measured, written to a file as they come.

    Args:
        path: of the JSON file.
        head: what the report begins with.
        budget_s: seconds after which no cell begins.
    """

    def __init__(self, path: Path, head: dict[str, Any], budget_s: float):
        self.path = path
        self.budget_s = budget_s
        self._started = time.monotonic()
        self._cells: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._head = {"schema": SCHEMA, **head, "budget_s": budget_s}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write(finished=False)

    @property
    def spent_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.budget_s - self.spent_s

    def put(
        self,
        family: str,
        cell: str,
        variant: str,
        figures: Figures,
        status: str = OK,
        reason: str | None = None,
    ) -> None:
        """Note a cell, in place of what was noted under the same three names."""
        self._cells[family, cell, variant] = {
            "family": family,
            "cell": cell,
            "variant": variant,
            "status": status,
            "reason": reason,
            "at_s": round(self.spent_s, 1),
            "figures": figures,
        }
        self.write(finished=False)
        shown = reason.strip().splitlines()[-1] if reason else _short(figures)
        print(f"[{self.spent_s:6.1f} s] {family} {cell} {variant}: {status} {shown}", flush=True)

    def measure(
        self,
        family: str,
        cell: str,
        variant: str,
        function: Callable[[], Figures],
        needs_s: float = 0.0,
    ) -> bool:
        """Run a function and note what it returns, or why it does not.

        Args:
            family, cell, variant: name of the cell.
            function: measures.
            needs_s: seconds that it takes; with less left, it is not begun.

        Returns:
            Whether it was measured.
        """
        if self.left_s <= needs_s:
            reason = f"the budget has {max(self.left_s, 0):.0f} s left, it needs {needs_s:.0f} s"
            self.put(family, cell, variant, {}, LEFT_OUT, reason)
            return False
        # Of an earlier round, where the cell has several.
        earlier = self._cells.get((family, cell, variant), {}).get("figures", {})
        try:
            figures = function()
        except LeftOut as error:
            self.put(family, cell, variant, {}, LEFT_OUT, str(error))
        except Exception:
            reason = without_folders(traceback.format_exc(limit=-6))
            self.put(family, cell, variant, earlier, ERROR, reason)
        except BaseException:
            if not earlier:
                self.put(family, cell, variant, {}, LEFT_OUT, "cut off when the budget was spent")
            raise
        else:
            self.put(family, cell, variant, figures)
            return True
        return False

    def as_dict(self, finished: bool) -> dict[str, Any]:
        """Return the report.

        Args:
            finished: whether all cells had their turn.
        """
        return {
            **self._head,
            "spent_s": round(self.spent_s, 1),
            "finished": finished,
            "cells": list(self._cells.values()),
        }

    def write(self, finished: bool) -> None:
        """Write the report; a run that is killed meanwhile leaves the last one whole."""
        text = json.dumps(self.as_dict(finished), indent=1) + "\n"
        replace_file(self.path, text.encode())


def without_folders(text: str) -> str:
    """Return a traceback whose files begin at their package: the rest is this machine's matter."""
    for folder in sorted(sys.path, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(f'File "{folder.rstrip("/")}/', 'File "')
    return text


def _short(figures: Figures) -> str:
    shown = []
    for name, value in figures.items():
        if isinstance(value, float):
            shown.append(f"{name}={value:.4g}")
        elif isinstance(value, (bool, int)):
            shown.append(f"{name}={value}")
    return " ".join(shown)

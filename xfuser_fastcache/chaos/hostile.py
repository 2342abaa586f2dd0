"""Values and lines of YAML and JSON that no one should give for an option."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from decimal import Decimal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("this has no text")


def nested(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def bomb() -> list[Any]:
    """Return a billion entries in a hundred places."""
    found: list[Any] = ["entry"]
    for _ in range(10):
        found = [found] * 10
    return found


def endless() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


# Values that YAML and JSON can hold.
_PLAIN: tuple[Any, ...] = (
    *(
        math.nan,
        math.inf,
        -math.inf,
        -1,
        -0.0,
        -1e-9,
        1e200,
        1e308,
        -1e308,
        10**19,
        10**400,
    ),
    *(
        True,
        False,
        None,
        "",
        " ",
        "0.1",
        "1e999",
        "nan",
        "block",
        "stack",
        "a\0b",
        "\ud800",
    ),
    *([], {}, [[]], [None], [math.nan], [1, 0, "1"], [1.0, 0], [10**400], [1e308] * 3),
    *({"name": ""}, {"name": 3}, {"name": "Fast", "epsilon": 1}, {"nam": "Fast"}, {"": 1}),
    *({"all_of": []}, {"any_of": "Fast"}, {"all_of": ["Fast"], "any_of": ["Fb"]}),
    *({1.0: 10**9}, {"0.1": 2, 0.1: 3}, {-1.0: 2}, {"x": 1}, {1: True}, {1e308: 1}),
    *("x" * 100_000, [1] + [0] * 20_001),
)
PLAIN: list[Callable[[], Any]] = [partial(deepcopy, value) for value in _PLAIN]
# Values that YAML can hold by its aliases.
ALIASED: list[Callable[[], Any]] = [bomb, endless]
# Values that only Python can hold.
LIVE: list[Callable[[], Any]] = [
    lambda: 10**5000,
    lambda: nested(330),
    lambda: nested(5000),
    Unshowable,
    lambda: [Unshowable()],
    object,
    lambda: b"Fast",
    lambda: 1j,
    lambda: Decimal("0.1"),
    lambda: range(3),
    lambda: {1, 0},
    lambda: (1, 0),
    lambda: len,
    lambda: Path("file"),
    lambda: np.float32(0.1),
    lambda: np.float64(0.1),
    lambda: np.float64("nan"),
    lambda: np.int64(3),
    lambda: np.bool_(True),
    lambda: np.array([1, 0, 1]),
    lambda: [np.array([1, 2]), 0],
    lambda: {"name": np.array(["Fast", "Fb"])},
    lambda: {("name",): 1, "name": "Fast"},
    lambda: torch.tensor(0.1),
    lambda: torch.ones(3),
    lambda: [torch.ones(2), torch.ones(2)],
    lambda: {torch.ones(1): 1},
]
# Lines that are valid YAML, or nearly, and mean something else than they seem to.
LINES = [
    *("{}: 010", "{}: 0x1F", "{}: 0b11", "{}: 1:30", "{}: 1_000", "{}: 2026-01-01", "{}: .inf"),
    *("{}: .nan", "{}: 1e999", "{}: " + "9" * 5000, "{}: !!int abc", "{}: !!timestamp x"),
    *("{}: !!python/object/apply:os.system [exit]", "{}: &a [*a]", "{}: &a {{b: *a}}", "{}: *a"),
    *("{0}: 1\n{0}: 2", "{}: {{1: 2, 1: 3}}", "{}: {{[1]: 2}}", "{}: {{{{}}: 2}}", "{}:\t1"),
    *(
        "{}: " + "[" * 330 + "]" * 330,
        "{}: " + "[" * 9999,
        "{}: [",
        "{}: yes",
        "{}: ~",
        "{}: |\n a",
    ),
    *('{{"{0}": 1, "{0}": 2}}', '{{"{}": NaN}}', '{{"{}": ' + "9" * 5000 + "}}"),
    *(
        '{{"{}": ' + "[" * 3000 + "]" * 3000 + "}}",
        "? {}\n: 1",
        "- {}",
        "{}: 1\n---\n{}: 2",
        "\0{}",
    ),
    # A billion entries in a hundred places.
    "a: &a [1]\n"
    + "".join(f"{y}: &{y} [{f'*{x}, ' * 9}]\n" for x, y in pairwise("abcdefghi"))
    + "{}: *i",
]

"""Checks of single options of a dataclass, each with an error that says what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn


class CheckedOptions:
    """Base of a dataclass whose fields say in their metadata what is `allowed`.

    Each check raises `TypeError` for a value of the wrong type and `ValueError` for one out of
    range. Numbers are stored as floats: 1 and 1.0 are one option, so they must have one digest.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def _refuse(self, name: str, error: type[Exception]) -> NoReturn:
        allowed = self.__dataclass_fields__[name].metadata["allowed"]
        raise error(f"{name}={getattr(self, name)!r} is not allowed; give {allowed}")

    def _number(self, name: str, within: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not is_number(value):
            self._refuse(name, TypeError)
        if not within(value):
            self._refuse(name, ValueError)
        object.__setattr__(self, name, float(value))

    def _four_numbers(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, list):
            self._refuse(name, TypeError)
        if not all(map(is_number, value)):
            self._refuse(name, TypeError)
        if len(value) != 4 or not all(math.isfinite(v) for v in value):
            self._refuse(name, ValueError)
        object.__setattr__(self, name, [float(v) for v in value])

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse(name, TypeError)
        if value < least:
            self._refuse(name, ValueError)

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str):
            self._refuse(name, TypeError)
        if value not in choices:
            self._refuse(name, ValueError)


def is_number(value: Any) -> bool:
    """Whether a value is a number and not a flag."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""Options as fields of a dataclass: each says what is allowed, what it means, and is checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Check(NamedTuple):
    """What an option may be.

    Attributes:
        allowed: in words.
        read: returns the value as it is kept; raises a bare `TypeError` for one of the wrong type,
            a bare `ValueError` for one out of range.
    """

    allowed: str
    read: Callable[[Any], Any]


def option(default: Any, check: Check, meaning: str, *, none: str = "", **more: Any) -> Any:
    """Return a dataclass field that documents and checks itself; see `CheckedOptions`.

    Args:
        default: where it is left out. None is always allowed then.
        check: for a value that is not None.
        meaning: with its unit.
        none: what None stands for, in words; for the documentation.
        **more: further metadata.
    """
    allowed = check.allowed + (", or none" if default is None and not none else "")
    metadata = {"allowed": allowed, "meaning": meaning, "check": check, "none": none, **more}
    return dataclasses.field(default=default, metadata=metadata)


def number(allowed: str, within: Callable[[float], bool]) -> Check:
    """A number, kept as a float: 1 and 1.0 are one option, so they must have one digest."""

    def read(value: Any) -> float:
        if not is_number(value):
            raise TypeError
        if not within(value):
            raise ValueError
        return float(value)

    return Check(allowed, read)


def at_least_0(allowed: str = "number >= 0") -> Check:
    """A finite number from 0 on."""
    return number(allowed, lambda value: 0 <= value < math.inf)


def integer(least: int, more: str = "") -> Check:
    """A whole number; `more` is said of it in words."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        if value < least:
            raise ValueError
        return value

    return Check(f"int >= {least}{more}", read)


def choice(*names: str) -> Check:
    """One of some words."""

    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError
        if value not in names:
            raise ValueError
        return value

    return Check(" | ".join(names), read)


def flag() -> Check:
    """True or false, and nothing that only stands for it."""
    return Check("true | false", _of(bool))


def text(allowed: str) -> Check:
    """Any text."""
    return Check(allowed, _of(str))


def numbers(allowed: str, count: int | None = None) -> Check:
    """A list of finite numbers, `count` of them or at least one; kept as a list of floats."""

    def read(value: Any) -> list[float]:
        if not isinstance(value, list) or not value or not all(map(is_number, value)):
            raise TypeError
        if len(value) != (count or len(value)) or not all(map(math.isfinite, value)):
            raise ValueError
        return [float(v) for v in value]

    return Check(allowed, read)


def _of(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return read


def is_number(value: Any) -> bool:
    """Whether a value is a number and not a flag."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def checked(option: dataclasses.Field[Any], value: Any, name: str = "") -> Any:
    """Return the value of an option as it is kept.

    Args:
        option: a field that `option` made.
        value: as it was given; None passes where the option's default is None.
        name: that it was given under, where it is not the field's.

    Raises:
        TypeError: a value of the wrong type; the message says what is allowed.
        ValueError: a value out of range, likewise.
    """
    if value is None and option.default is None:
        return None
    try:
        return option.metadata["check"].read(value)
    except (TypeError, ValueError) as error:
        if error.args:
            raise
        allowed = option.metadata["allowed"]
        raise type(error)(
            f"{name or option.name}={value!r} is not allowed; give {allowed}"
        ) from None


def options_of(method: Any) -> Mapping[str, dataclasses.Field[Any]]:
    """Return the options of a dataclass or of one of its instances, by name."""
    if not dataclasses.is_dataclass(method):
        return {}
    return {f.name: f for f in dataclasses.fields(method) if "check" in f.metadata}


class CheckedOptions:
    """Base of a frozen dataclass some of whose fields are options, made by `option`.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Every(CheckedOptions):
        ...     interval: int = option(5, integer(1), "steps")
        >>> Every(0)
        Traceback (most recent call last):
        ...
        ValueError: interval=0 is not allowed; give int >= 1
    """

    def __post_init__(self) -> None:
        for name, found in options_of(self).items():
            object.__setattr__(self, name, checked(found, getattr(self, name)))

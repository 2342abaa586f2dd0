"""Options as fields of a dataclass: each says what is allowed, what it means, and is checked."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Far beyond what any model or schedule asks for, and far from where arithmetic ends.
LARGEST = 1e9
MOST = 10_000
# Of one value, as YAML and JSON hold it: how deep it nests, and how many entries it has, where
# those behind an alias count each time.
LEVELS = 16
ENTRIES = 2 * MOST


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


def number(
    least: float = 0.0, most: float = LARGEST, more: str = "", *, ends: bool = True
) -> Check:
    """A number, kept as a float: 1 and 1.0 are one option, so they must have one digest.

    Args:
        least, most: its range; far beyond all use where nothing else bounds it.
        more: said of it in words.
        ends: whether the range holds its ends.

    Example:
        >>> number().allowed, number(0, 1, ends=False).allowed
        ('0 <= number <= 1e+09', '0 < number < 1')
    """
    sign = "<=" if ends else "<"

    def read(value: Any) -> float:
        if not is_number(value):
            raise TypeError
        if not (least <= value <= most if ends else least < value < most):
            raise ValueError
        return float(value)

    return Check(f"{least:g} {sign} number {sign} {most:g}{more}", read)


def integer(least: int, most: int = MOST, more: str = "") -> Check:
    """A whole number; `more` is said of it in words."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        if not least <= value <= most:
            raise ValueError
        return value

    return Check(f"{least} <= int <= {most}{more}", read)


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


def path() -> Check:
    """A file's name. An empty one, such as an unset variable of the shell leaves, is none."""

    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError
        if not value or "\0" in value:
            raise ValueError
        return value

    return Check("path", read)


def numbers(least: int, most: int, more: str = "") -> Check:
    """A list of `least` to `most` numbers, kept as floats; `more` is said of it in words."""
    count = f"{least}" if least == most else f"{least} to {most}"

    def read(value: Any) -> list[float]:
        if not isinstance(value, list) or not value or not all(map(is_number, value)):
            raise TypeError
        if not least <= len(value) <= most or not all(abs(v) <= LARGEST for v in value):
            raise ValueError
        return [float(v) for v in value]

    return Check(f"list of {count} numbers, each from {-LARGEST:g} to {LARGEST:g}{more}", read)


def _of(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return read


class _Shown(reprlib.Repr):
    """As `repr`, but short, and also of what `repr` fails on."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxdict = self.maxlist = self.maxtuple = 12

    def repr_int(self, x: int, level: int) -> str:
        """Say how large an int is that has too many digits to be written."""
        return repr(x) if x.bit_length() <= 128 else f"an int of {x.bit_length()} bits"


def shown(value: Any) -> str:
    """Return a value as messages show it.

    Example:
        >>> shown({"name": "Fb"}), shown(10**5000)
        ("{'name': 'Fb'}", 'an int of 16610 bits')
    """
    return _Shown().repr(value)


def refuse_unwieldy(name: str, value: Any) -> None:
    """Refuse what holds itself, nests deep or has very many entries, as aliases of YAML may.

    Args:
        name: that the message begins with.
        value: as it was given.

    Raises:
        ValueError: naming it and the limit.

    Example:
        >>> nine = ["nine"] * 9
        >>> for _ in range(9):
        ...     nine = [nine] * 9
        >>> refuse_unwieldy("gate", nine)
        Traceback (most recent call last):
        ...
        ValueError: gate holds more than 20000 entries, counting those behind an alias each time
    """
    waiting, entries = [(value, 0)], 0
    while waiting:
        held, level = waiting.pop()
        if not isinstance(held, (dict, list, tuple, set, frozenset)):
            continue
        if level == LEVELS:
            raise ValueError(f"{name} nests more than {LEVELS} levels deep, or holds itself")
        entries += len(held)
        if entries > ENTRIES:
            raise ValueError(
                f"{name} holds more than {ENTRIES} entries, counting those behind an alias each "
                "time"
            )
        parts = [*held, *held.values()] if isinstance(held, dict) else held
        waiting += [(part, level + 1) for part in parts]


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
    name = name or option.name
    refuse_unwieldy(name, value)
    try:
        return option.metadata["check"].read(value)
    except (TypeError, ValueError) as error:
        if error.args:
            raise
        allowed = option.metadata["allowed"]
        raise type(error)(f"{name}={shown(value)} is not allowed; give {allowed}") from None


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
        ValueError: interval=0 is not allowed; give 1 <= int <= 10000
    """

    def __post_init__(self) -> None:
        for name, found in options_of(self).items():
            object.__setattr__(self, name, checked(found, getattr(self, name)))

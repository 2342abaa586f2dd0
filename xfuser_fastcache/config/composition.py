"""How gates are named and combined in a config, in words that YAML and JSON hold.

    "Tea"                                                       a gate with its own defaults
    {"name": "Tea", "cache_ratio_threshold": 0.3}               a gate with options
    {"all_of": ["Fast", {"name": "Fb", "rel_l1_thresh": 0.1}]}  skip where both would
    {"any_of": [...]}                                           skip where one would

A name is a backend's, for its gate, or one that another package has registered.
"""

from __future__ import annotations

from typing import Any

COMBINATIONS = ("all_of", "any_of")
ALLOWED = (
    "a gate's name, {'name': NAME, OPTION: VALUE, ...}, {'all_of': [GATES]} or {'any_of': [GATES]}"
)


def check(given: Any) -> None:
    """Check the form of a named or combined gate; names are looked up when a cache is applied.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a mapping of another form.

    Example:
        >>> check({"all_of": ["Fast", {"name": "Tea"}]})
        >>> check({"all_of": []})
        Traceback (most recent call last):
        ...
        ValueError: gate={'all_of': []} names no gate; give a list of at least one
    """
    if isinstance(given, str):
        return
    if not isinstance(given, dict):
        raise TypeError(f"gate={given!r} is not allowed; give {ALLOWED}")
    key = combination(given)
    if key is None:
        if not isinstance(given.get("name"), str):
            raise ValueError(f"gate={given!r} is not allowed; give {ALLOWED}")
        return
    if not isinstance(given[key], list) or not given[key]:
        raise ValueError(f"gate={given!r} names no gate; give a list of at least one")
    for part in given[key]:
        check(part)


def combination(given: dict[str, Any]) -> str | None:
    """Return which combination a mapping is, or None where it names one gate.

    Raises:
        ValueError: a combination with something beside it.
    """
    found = [key for key in COMBINATIONS if key in given]
    if found and len(given) > 1:
        raise ValueError(f"gate={given!r} is not allowed; {found[0]!r} stands alone in its mapping")
    return found[0] if found else None

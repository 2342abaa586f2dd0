"""How methods are named in a config, in words that YAML and JSON hold.

    "Tea"                                                       a method with its own defaults
    {"name": "Tea", "cache_ratio_threshold": 0.3}               a method with options
    {"all_of": ["Fast", {"name": "Fb", "rel_l1_thresh": 0.1}]}  gates: skip where both would
    {"any_of": [...]}                                           gates: skip where one would
    ["motion_static", {"name": "merging", "merge_ratio": 0.5}]  token plans: one inside the other

A name is one of this package's or one that another package has registered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from xfuser_fastcache.config.checks import Check, shown
from xfuser_fastcache.config.other_names import renamed

COMBINATIONS = ("all_of", "any_of")
ONE = "{'name': NAME, OPTION: VALUE, ...}"
GATE = f"a gate's name, {ONE}, {{'all_of': [GATES]}} or {{'any_of': [GATES]}}"


class Spec(NamedTuple):
    """A method by name, with the options that were given."""

    name: str
    options: dict[str, Any]


def spec_of(kind: str, given: Any) -> Spec:
    """Read a method's name or mapping.

    Args:
        kind: of the method; the option that holds it.
        given: the name, or the mapping with `name`.

    Raises:
        TypeError: neither.
        ValueError: a mapping without a name, or an option by a name that `renamed` refuses.

    Example:
        >>> spec_of("gate", {"name": "Fb", "rel_l1_thresh": 0.1})
        Spec(name='Fb', options={'cache_ratio_threshold': 0.1})
    """
    allowed = GATE if kind == "gate" else f"the name of a {kind}, or {ONE}"
    if isinstance(given, str):
        return Spec(given, {})
    if not isinstance(given, dict):
        raise TypeError(f"{kind}={shown(given)} is not allowed; give {allowed}")
    named = isinstance(given.get("name"), str)
    if not named or not all(isinstance(key, str) for key in given):
        raise ValueError(f"{kind}={shown(given)} is not allowed; give {allowed}")
    options = {key: value for key, value in given.items() if key != "name"}
    return Spec(given["name"], renamed(options, given["name"]))


def combination(given: Any) -> str | None:
    """Return which combination of gates a mapping is, or None where it names one gate.

    Raises:
        ValueError: a combination with something beside it, or of nothing.
    """
    found = [key for key in COMBINATIONS if isinstance(given, dict) and key in given]
    if not found:
        return None
    if len(given) > 1:
        raise ValueError(
            f"gate={shown(given)} is not allowed; {found[0]!r} stands alone in its mapping"
        )
    if not isinstance(given[found[0]], list) or not given[found[0]]:
        raise ValueError(f"gate={shown(given)} names no gate; give a list of at least one")
    return found[0]


def single_gates(given: Any) -> Iterator[Any]:
    """Yield each gate of a combination, or the one that is given.

    Example:
        >>> list(single_gates({"all_of": ["Fast", {"any_of": ["Fb", "Tea"]}]}))
        ['Fast', 'Fb', 'Tea']
    """
    key = combination(given)
    if key is None:
        yield given
        return
    for part in given[key]:
        yield from single_gates(part)


def _read_gate(given: Any) -> Any:
    for one in single_gates(given):
        spec_of("gate", one)
    return given


def _read_forecaster(given: Any) -> Any:
    spec_of("forecaster", given)
    return given


def _read_token_plan(given: Any) -> Any:
    listed = given if isinstance(given, list) else [given]
    names = [spec_of("token_plan", one).name for one in listed]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"token_plan={shown(given)} is not allowed; give at least one, each once")
    return given


GATES_CHECK = Check(GATE, _read_gate)
FORECASTER_CHECK = Check(f"a forecaster's name, or {ONE}", _read_forecaster)
TOKEN_PLAN_CHECK = Check(f"a token plan's name, {ONE}, or a list of these", _read_token_plan)

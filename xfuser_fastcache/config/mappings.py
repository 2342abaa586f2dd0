"""YAML and JSON files that hold one mapping, in the part of both that nobody can misread."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from xfuser_fastcache.config.checks import refuse_unwieldy, shown
from xfuser_fastcache.config.reading import read_regular

# Bytes of a file; pure Python reads about 1 MB of YAML in some seconds.
_MOST_BYTES = 2**20
# Nodes within nodes, of the whole file.
_LEVELS = 64
# Digits of an int; Python reads no more than 4,300 unasked.
_DIGITS = 4000
# Read in YAML 1.1 as nobody means them today: 010 as 8, 1:30 as 90, a date as no text.
_REPLACED = ("int", "float", "timestamp")


class _Yaml(yaml.SafeLoader):
    """YAML as JSON and YAML 1.2 read it: what is spelled as a number in neither is text.

    A key stands once in a mapping, and no value has a tag.
    """

    _depth = 0
    _key = "the document"

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.composer.ComposerError(
                None, None, f"the tag {event.tag!r} is not allowed; leave it out", event.start_mark
            )
        if self._depth == _LEVELS:
            raise yaml.composer.ComposerError(
                None, None, f"{self._key} nests more than {_LEVELS} levels deep", event.start_mark
            )
        if self._depth == 1 and isinstance(index, yaml.ScalarNode):
            self._key = index.value
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            # What is merged in may be said again; other keys are text and numbers.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                value = self.construct_object(key)
                if value in keys:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {shown(value)} stands there twice", key.start_mark
                    )
                keys.add(value)
        return node


_Yaml.yaml_implicit_resolvers = {
    first: [found for found in known if found[0].rpartition(":")[2] not in _REPLACED]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _spelling in {
    "int": rf"[-+]?(?:0|[1-9][0-9]{{0,{_DIGITS}}})",
    "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}.items():
    _Yaml.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_spelling})$"), list("-+.0123456789")
    )


def _int(digits: str) -> int | str:
    """Read an int of JSON; one that no option could be stays text."""
    return int(digits) if len(digits) <= _DIGITS else digits


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Read an object of JSON."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands there twice")
        found[key] = value
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_int=_int, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError):
        # Not all JSON is YAML: tabs are not. What nests too deep for the one is named by the other.
        return yaml.load(text, _Yaml)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        ValueError: no such file, one that is not regular, one that does not parse, a key that
            stands twice, values that nest deep or hold themselves, or something else than a
            mapping of names.
    """
    try:
        loaded = _parsed(read_regular(path, _MOST_BYTES).decode())
    except OSError as error:
        raise ValueError(f"cannot read the config file {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"the config file {str(path)!r} is not valid YAML or JSON: {error}"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(
            f"the config file {str(path)!r} must hold a mapping of options, not "
            f"{type(loaded).__name__}"
        )
    for key, value in loaded.items():
        if not isinstance(key, str):
            raise ValueError(
                f"{shown(key)} in the config file {str(path)!r} is no name of an option"
            )
        refuse_unwieldy(f"{key} in the config file {str(path)!r}", value)
    return loaded

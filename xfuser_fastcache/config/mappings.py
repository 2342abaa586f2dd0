"""YAML and JSON files that hold one mapping."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml


class _Yaml(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in JSON and in YAML 1.2; YAML 1.1 takes it for text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        ValueError: no such file, a file that does not parse, or one that holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            # Not all JSON is YAML: tabs are not.
            loaded = json.loads(text)
        except json.JSONDecodeError:
            loaded = yaml.load(text, _Yaml)
    except OSError as error:
        raise ValueError(f"cannot read the config file {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the config file {str(path)!r} is not valid YAML or JSON: {error}"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(
            f"the config file {str(path)!r} must hold a mapping of options, not "
            f"{type(loaded).__name__}"
        )
    return loaded

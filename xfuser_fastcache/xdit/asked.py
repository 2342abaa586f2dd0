"""Options of a cache as users of xDiT give them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def read_options(cache_config: Any) -> dict[str, Any]:
    """Return options that are given as JSON or as a mapping; none where nothing is given.

    Raises:
        ValueError: something else.
    """
    options = {} if cache_config is None else cache_config
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except json.JSONDecodeError as error:
            raise ValueError(f"cache_config={options!r} is not valid JSON: {error}") from error
    if not isinstance(options, Mapping):
        raise ValueError(
            f"cache_config={cache_config!r} must hold a mapping of options, such as "
            '{"cache_ratio_threshold": 0.1}'
        )
    return dict(options)

"""Files of what was fitted: safetensors, written in one go, read whole or refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Kind(NamedTuple):
    """What a file is for.

    Attributes:
        option: of `CacheConfig` that takes it; also its name in messages.
        script: makes it.
    """

    option: str
    script: str


class Held(NamedTuple):
    """What a file holds.

    Attributes:
        tables: its tensors by name.
        metadata: its metadata, each value read as JSON.
        digest: of both, in hexadecimal.
    """

    tables: dict[str, NDArray[Any]]
    metadata: dict[str, Any]
    digest: str


def write_file(path: str | Path, tables: dict[str, NDArray[Any]], metadata: dict[str, Any]) -> None:
    """Write a safetensors file in one go: another process sees all of it or nothing.

    Args:
        path: its folder is made where there is none.
        tables: tensors by name.
        metadata: values that JSON can hold.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(table) for name, table in tables.items()},
        part,
        metadata={key: json.dumps(value) for key, value in metadata.items()},
    )
    part.replace(path)


def read_file(path: str | Path, kind: Kind) -> Held:
    """Read what `write_file` wrote.

    Raises:
        ValueError: no such file, or a truncated one; with the reason.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}
            meta = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
    except OSError as error:
        raise ValueError(f"cannot read the {kind.option} {str(path)!r}: {error}") from error
    except (SafetensorError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} is no whole {kind.option} file ({error}); make it anew with "
            f"{kind.script}"
        ) from error
    # Not of the file's bytes: safetensors writes the metadata in any order.
    content = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(held):
        content.update(held[name].tobytes())
    return Held(held, meta, content.hexdigest())

"""Files of what was fitted: safetensors and a checksum, written in one go, read whole or not."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfuser_fastcache.config.reading import read_regular

logger = logging.getLogger("xfuser_fastcache")

# Bytes of a file; linear maps of the widest models in full have some 2**30.
_MOST_BYTES = 2**33
_CHECKSUM = "checksum"
# Stands in the file in the checksum's place while that is computed.
_BLANK = "0" * hashlib.sha256().digest_size * 2


class Kind(NamedTuple):
    """What a file is for.

    Attributes:
        option: of `CacheConfig` that takes it; also its name in messages.
        script: makes it.
        key: of the metadata, under which the version of its layout stands.
        version: that is written and read.
        unsealed: the version before, which is read too: the same layout without a checksum.
    """

    option: str
    script: str
    key: str
    version: int
    unsealed: int


class Held(NamedTuple):
    """What a file holds.

    Attributes:
        tables: its tensors by name.
        metadata: its metadata, each value read as JSON, without version and checksum.
        digest: of both, in hexadecimal.
    """

    tables: dict[str, NDArray[Any]]
    metadata: dict[str, Any]
    digest: str


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in one go: another process sees all of it or nothing.

    Args:
        path: its folder is made where there is none.
        content: all of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Nobody can have put a link or a pipe under a name that nobody could guess.
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_file(
    path: str | Path, kind: Kind, tables: dict[str, NDArray[Any]], metadata: dict[str, Any]
) -> None:
    """Write a safetensors file in one go, with a checksum over every byte of it.

    Args:
        path: its folder is made where there is none.
        kind: of the file.
        tables: tensors by name.
        metadata: values that JSON can hold.
    """
    from safetensors.numpy import save

    texts = {name: json.dumps(value) for name, value in metadata.items()}
    texts |= {kind.key: json.dumps(kind.version), _CHECKSUM: _BLANK}
    content = save({name: np.ascontiguousarray(table) for name, table in tables.items()}, texts)
    replace_file(path, content.replace(_BLANK.encode(), _checksum(content, _BLANK).encode(), 1))


def read_file(path: str | Path, kind: Kind) -> Held:
    """Read what `write_file` wrote, or what earlier releases wrote without a checksum.

    Raises:
        ValueError: no such file, one that is not regular, a truncated one, one of another version,
            or one of which a bit has changed; with the reason.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    name = repr(str(path))
    try:
        content = read_regular(path, _MOST_BYTES)
    except OSError as error:
        raise ValueError(f"cannot read the {kind.option} {name}: {error.strerror}") from error
    try:
        tables = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        texts = header.get("__metadata__", {})
        checksum = texts.pop(_CHECKSUM, None)
        meta = {key: json.loads(text) for key, text in texts.items()}
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} is no whole {kind.option} file ({error}); make it anew with {kind.script}"
        ) from error
    version = meta.pop(kind.key, None)
    if version not in (kind.version, kind.unsealed) or isinstance(version, bool):
        raise ValueError(
            f"{name} holds {kind.option} of version {version}; this release reads version "
            f"{kind.version}, and {kind.unsealed} of earlier releases. Make it anew with "
            f"{kind.script}"
        )
    if checksum is None and version == kind.unsealed:
        logger.warning(
            "%s was written by an earlier release and has no checksum, so that a bit that has "
            "changed since goes unnoticed. Load and save it once to add one.",
            name,
        )
    elif checksum is None or checksum != _checksum(content, checksum):
        raise ValueError(
            f"{name} is not as it was written: its checksum is {checksum}, and its bytes have "
            f"another. Copy it again, or make it anew with {kind.script}"
        )
    return Held(tables, meta, _digest(tables, meta))


def kind_of(path: str | Path, kinds: Sequence[Kind]) -> Kind:
    """Return which kind a file is of; the first where it is of none, whose reader then says why.

    Args:
        path: of the file.
        kinds: that it may be of.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        metadata = {}
    return next((kind for kind in kinds if kind.key in metadata), kinds[0])


def _checksum(content: bytes, written: str) -> str:
    """Return the checksum of a file; the place of the one that is `written` counts as blank."""
    return hashlib.sha256(content.replace(written.encode(), _BLANK.encode(), 1)).hexdigest()


def _digest(tables: dict[str, NDArray[Any]], metadata: dict[str, Any]) -> str:
    """Return the digest of the content; safetensors writes metadata in any order."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, table in sorted(tables.items()):
        found.update(json.dumps([name, table.dtype.str, table.shape]).encode() + table.tobytes())
    return found.hexdigest()

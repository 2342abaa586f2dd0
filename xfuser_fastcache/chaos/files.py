"""Calibrations and linear maps, changed a little: refused by the file's name, or read as written.

Of three trials one flips a bit of the payload; the others do everything else.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from xfuser_fastcache.artifacts.calibration import CALIBRATION, load_fitted
from xfuser_fastcache.artifacts.file import Kind, write_file
from xfuser_fastcache.artifacts.linear_maps import LINEAR_MAPS, load_maps
from xfuser_fastcache.chaos.specimens import calibration, maps
from xfuser_fastcache.chaos.trials import Verdict


class Specimen(NamedTuple):
    """A file as it was written.

    Attributes:
        kind: of the file.
        content: all of it.
        read: loads one.
        numbers: keys of its metadata that are no words.
    """

    kind: Kind
    content: bytes
    read: Callable[[Path], Any]
    numbers: tuple[str, ...]

    @property
    def header(self) -> int:
        """Bytes before the payload."""
        return 8 + int.from_bytes(self.content[:8], "little")

    @property
    def texts(self) -> dict[str, str]:
        """Its metadata as it stands there."""
        found: dict[str, str] = json.loads(self.content[8 : self.header])["__metadata__"]
        return found

    def sealed(self, path: Path, tables: dict[str, Any], **metadata: Any) -> None:
        """Write other tables and metadata with a checksum that is right."""
        known = {key: json.loads(t) for key, t in self.texts.items() if key != "checksum"}
        write_file(path, self.kind, tables, {**known, **metadata})


@cache
def _specimens() -> tuple[Specimen, Specimen]:
    numbers = ("exponents", "upper", "scales", "masks", "cache_ratio_threshold")
    with tempfile.TemporaryDirectory(prefix="fastcache-chaos-") as folder:
        path = Path(folder) / "file"
        calibration().save(path)
        fitted = Specimen(CALIBRATION, path.read_bytes(), load_fitted, numbers)
        maps().save(path)
        return fitted, Specimen(LINEAR_MAPS, path.read_bytes(), load_maps, ("edges",))


def _payload_bit(draw: random.Random, whole: Specimen, path: Path) -> None:
    _flip(whole, path, draw.randrange(8 * whole.header, 8 * len(whole.content)))


def _header_bit(draw: random.Random, whole: Specimen, path: Path) -> None:
    _flip(whole, path, draw.randrange(8 * whole.header))


def _flip(whole: Specimen, path: Path, bit: int) -> None:
    content = bytearray(whole.content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _bytes(draw: random.Random, whole: Specimen, path: Path) -> None:
    """Leave out, add, repeat, blank or exchange a run of bytes."""
    content, count = whole.content, draw.choice([1, 8, 64, 700])
    begin = draw.randrange(len(content) - count)
    before, run, after = content[:begin], content[begin : begin + count], content[begin + count :]
    other = bytes((byte + 1) % 256 for byte in run)
    path.write_bytes(
        draw.choice(
            [before, after, before + after, before + run + run + after, content + run]
            + [before + other + after, other, b"", before + bytes(draw.randbytes(count)) + after]
        )
    )


def _values(draw: random.Random, whole: Specimen, path: Path) -> None:
    """Write a table that none of the kind has, and its checksum."""
    tables = {name: np.array(table) for name, table in load(whole.content).items()}
    name = draw.choice([name for name, table in tables.items() if table.size])
    table = tables[name]
    how = draw.choice(["nan", "-inf", "vast", "integers", "longer", "flat", "gone", "more"])
    if how in ("nan", "-inf", "vast"):
        # Slopes may be as large as they like: such a cell never skips.
        table.reshape(-1)[draw.randrange(table.size)] = {"vast": -1e30}.get(how) or float(how)
    elif how == "gone":
        del tables[name]
        if whole.kind is LINEAR_MAPS:  # without one map it is another file, and sound
            tables["linear.image.9.bias"] = table
    elif how == "more":
        tables[name + "s"] = table
    else:
        tables[name] = {
            "integers": lambda: np.ones(table.shape, np.int32),
            "longer": lambda: np.concatenate([table, table]),
            "flat": lambda: table.reshape(1, -1),
        }[how]()
        # A map alone may be of any width.
        if whole.kind is LINEAR_MAPS and how == "longer":
            tables[name] = table.reshape(1, -1)
    whole.sealed(path, tables)


def _metadata(draw: random.Random, whole: Specimen, path: Path) -> None:
    """Write metadata that mean nothing, and their checksum."""
    wrong: list[Any] = [
        None,
        "x",
        [[]],
        {"a": "b"},
        float("nan"),
        -1,
        True,
        [1e999, 0],
        [[0.1]] * 2,
        "9" * 99,
    ]
    whole.sealed(path, load(whole.content), **{draw.choice(whole.numbers): draw.choice(wrong)})


def _header(draw: random.Random, whole: Specimen, path: Path) -> None:
    """Write metadata that are no JSON, of another version or of no release."""
    texts = dict(whole.texts)
    key = draw.choice([whole.kind.key, "checksum", draw.choice(list(texts))])
    if draw.random() < 0.3:
        del texts[key]
    else:
        texts[key] = draw.choice(["", "[" * 50_000, "9" * 5000, "null", "0", "1e999", '"x"', "NaN"])
    path.write_bytes(save(load(whole.content), texts))


def _no_file(draw: random.Random, whole: Specimen, path: Path) -> None:
    """Put there what is no regular file."""
    draw.choice(
        [
            lambda: None,
            path.mkdir,
            lambda: os.mkfifo(path),
            lambda: path.symlink_to("nowhere"),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("/dev/zero"),
        ]
    )()


def _unchanged(draw: random.Random, whole: Specimen, path: Path) -> None:
    """Write it as it was: by another name, or through a link."""
    path.write_bytes(whole.content)
    if draw.random() < 0.3:
        path.rename(path.with_name("other"))
        path.symlink_to("other")


OTHERS = (_header_bit, _bytes, _values, _metadata, _header, _no_file, _unchanged)


def _ended(change: Any, whole: Specimen, path: Path) -> tuple[bool, str, str]:
    """Return whether it held, how it ended, and what was said."""
    try:
        found = whole.read(path)
    except ValueError as error:
        named = str(path) in str(error) and change is not _unchanged
        return named, "refused by name" if named else "refused wrongly", repr(error)
    known, again = load(whole.content), path.with_name("again")
    found.save(again)
    equal = {name: table.tobytes() for name, table in load(again.read_bytes()).items()} == {
        name: table.tobytes() for name, table in known.items()
    }
    held = change is _unchanged and equal and path.read_bytes() == whole.content
    return held, "read as written" if held else "accepted", found.digest


def trial(seed: int) -> Verdict:
    """Read the file that a seed stands for."""
    draw, began = random.Random(seed), time.monotonic()
    whole = draw.choice(_specimens())
    change = draw.choice(OTHERS) if seed % 3 else _payload_bit
    kind = f"{whole.kind.option}: {change.__name__.strip('_').replace('_', ' ')}"
    with tempfile.TemporaryDirectory(prefix="fastcache-chaos-") as folder:
        path = Path(folder) / "file"
        change(draw, whole, path)
        try:
            held, ending, detail = _ended(change, whole, path)
        except Exception:
            held, ending, detail = False, "internal error", traceback.format_exc(limit=-3)
    return Verdict(seed, kind, held, ending, detail[:2000], time.monotonic() - began)

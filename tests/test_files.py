"""Files of what was fitted are read as they were written, or not at all."""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load, save
from support.calibrations import fitted_on

from xfuser_fastcache.artifacts.calibration import CALIBRATION, load_fitted
from xfuser_fastcache.artifacts.file import Kind, replace_file
from xfuser_fastcache.artifacts.linear_map import LinearMap, SpanMaps
from xfuser_fastcache.artifacts.linear_maps import LINEAR_MAPS, MAPPED, FittedMaps, load_maps
from xfuser_fastcache.config.reading import read_regular

ROOT = Path(__file__).resolve().parent.parent


def calibration(path: Path) -> None:
    fitted_on([1.0, 0.5], metadata={"cache_ratio_threshold": 1e-5, "note": "\u00e9"}).save(path)


def maps(path: Path) -> None:
    held = SpanMaps((0.5,), (LinearMap(diagonal=torch.ones(8)),), (None,))
    FittedMaps(dict.fromkeys(MAPPED, held), {"rate": 1e-7}).save(path)


both = pytest.mark.parametrize(
    ("write", "read", "kind"),
    [(calibration, load_fitted, CALIBRATION), (maps, load_maps, LINEAR_MAPS)],
    ids=["calibration", "maps"],
)


@both
def test_no_bit_can_change_anywhere(
    tmp_path: Path, write: Callable[[Path], None], read: Callable[[Path], Any], kind: Kind
) -> None:
    write(path := tmp_path / "file")
    whole, digest = path.read_bytes(), read(path).digest
    draw = random.Random(0)
    header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    # Of the header, where some spellings mean the same, and of the tables.
    parts = range(header), range(header, 8 * len(whole))
    same = [8 * e.start() + 5 for e in re.finditer(rb"(?<=1)e(?=-0)|(?<=u00)e(?=9)", whole)]
    assert same
    for bit in [*same, *(bit for part in parts for bit in draw.sample(part, 200))]:
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=str(path)):
            read(path)
    path.write_bytes(whole)
    assert read(path).digest == digest


def unsealed(path: Path, kind: Kind, version: int) -> None:
    """Write a file anew as earlier releases did."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    texts = header["__metadata__"] | {kind.key: str(version)}
    del texts["checksum"]
    path.write_bytes(save(load(content), texts))


@both
def test_a_file_of_an_earlier_release_loads_and_says_that_it_has_no_checksum(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    write: Callable[[Path], None],
    read: Callable[[Path], Any],
    kind: Kind,
) -> None:
    write(path := tmp_path / "file")
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"):
        digest = read(path).digest
        assert not caplog.records
        unsealed(path, kind, kind.unsealed)
        assert read(path).digest == digest
    (said,) = caplog.records
    assert "has no checksum" in said.getMessage() and str(path) in said.getMessage()
    unsealed_now = path.read_bytes()
    # Today's version without a checksum is no file of any release.
    write(path)
    unsealed(path, kind, kind.version)
    with pytest.raises(ValueError, match="is not as it was written: its checksum is None"):
        read(path)
    path.write_bytes(unsealed_now)
    read(path).save(path)
    caplog.clear()
    assert read(path).digest == digest and not caplog.records


def test_a_checksum_that_an_earlier_version_has_is_checked_too(tmp_path: Path) -> None:
    calibration(path := tmp_path / "file")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"version":"7"', b'"version":"6"'))
    with pytest.raises(ValueError, match="is not as it was written"):
        load_fitted(path)


@pytest.mark.parametrize("toy", ["flux", "sd3", "pixart"])
def test_calibrations_of_the_toys_have_their_checksums(
    toy: str, caplog: pytest.LogCaptureFixture
) -> None:
    load_fitted(ROOT / "toys" / toy / "fastcache.safetensors")
    assert not caplog.records


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in {
        str(tmp_path / "pipe"): "no regular file",
        "/dev/zero": "no regular file",
        str(tmp_path): "Is a directory",
        "a\0b": "null byte",
        "\ud800": "surrogates not allowed",
    }.items():
        with pytest.raises(OSError) as caught:
            read_regular(name, 100)
        assert words in str(caught.value.strerror)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, more than 4"):
        read_regular(path, 4)


def test_a_file_is_replaced_in_one_go_beside_what_others_left_there(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("theirs")
    # Who knew the temporary file's name could have us write through a link.
    (tmp_path / "file.part").symlink_to(other)
    replace_file(tmp_path / "file", b"one")
    replace_file(tmp_path / "file", b"two")
    assert (tmp_path / "file").read_bytes() == b"two" and other.read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.part", "other"]
    with pytest.raises(IsADirectoryError):
        (tmp_path / "folder").mkdir()
        replace_file(tmp_path / "folder", b"three")
    assert len(list(tmp_path.iterdir())) == 4

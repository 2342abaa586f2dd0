"""Whether the fast suite would notice: bugs are planted in a copy of the package, one at a time.

The bugs stand in planted_bugs.yaml. That each can still be planted is a default test; that each is
caught takes minutes (`pytest -m slow -s tests/test_planted_bugs.py`, which prints the count).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.worlds import OF_RANKS, ROOT

COPIED = ("xfuser_fastcache", "diffusers_adapters", "tests", "pyproject.toml")
# Of pytest: tests ran, and some failed.
CAUGHT = 1


@dataclass(frozen=True)
class Planted:
    """A bug, as planted_bugs.yaml has it."""

    bug: str
    area: str
    file: str
    old: str
    new: str
    caught_by: str

    def patched(self, source: str) -> str:
        """Return a file's text with the bug in it.

        Raises:
            ValueError: the line is not there, or not once.
        """
        lines = source.splitlines(keepends=True)
        found = [number for number, line in enumerate(lines) if line.strip() == self.old]
        if len(found) != 1:
            raise ValueError(
                f"{self.file} has the line {self.old!r} {len(found)} times, and has to have it "
                "once: bring planted_bugs.yaml up to date"
            )
        line = lines[found[0]]
        lines[found[0]] = line.replace(self.old, self.new)
        return "".join(lines)


BUGS = [
    Planted(**entry) for entry in yaml.safe_load((ROOT / "tests/planted_bugs.yaml").read_text())
]


def test_there_are_three_bugs_of_each_area() -> None:
    areas = Counter(planted.area for planted in BUGS)
    assert areas == dict.fromkeys(("moments", "policy", "clock", "consensus"), 3)
    assert len({planted.bug for planted in BUGS}) == len(BUGS)


@pytest.mark.parametrize("planted", BUGS, ids=lambda planted: planted.bug)
def test_a_bug_can_be_planted_in_exactly_one_place(planted: Planted) -> None:
    source = (ROOT / planted.file).read_text()
    patched = planted.patched(source)
    compile(patched, planted.file, "exec")
    assert patched != source
    assert (ROOT / planted.caught_by).is_file()


@pytest.mark.parametrize("source", ["x = 1\n", "x = 2\nif x:\n    x = 2\n"])
def test_a_line_that_is_not_there_once_is_an_error(source: str) -> None:
    planted = Planted("b", "a", "f.py", old="x = 2", new="x = 3", caught_by="t")
    with pytest.raises(ValueError, match="up to date"):
        planted.patched(source)


def exit_status(folder: Path, module: str) -> int:
    """Run a module's default tests in a copy, up to the first that fails."""
    command = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", module)
    environment = {**os.environ, **OF_RANKS, "PYTHONPATH": str(folder)}
    # No pipes: servers that a test leaves behind for a while would keep them open.
    none = subprocess.DEVNULL
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=none, stderr=none, timeout=900
    ).returncode


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_fast_suite_catches_every_bug(tmp_path: Path) -> None:
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    modules = sorted({planted.caught_by for planted in BUGS})
    failing = [module for module in modules if exit_status(tmp_path, module) != 0]
    assert not failing, f"these fail without any bug: {failing}"
    missed = []
    for planted in BUGS:
        path = tmp_path / planted.file
        source = path.read_text()
        path.write_text(planted.patched(source))
        status = exit_status(tmp_path, planted.caught_by)
        path.write_text(source)
        print(f"{planted.area}: {planted.bug}: {'caught' if status == CAUGHT else status}")
        missed += [planted.bug] if status != CAUGHT else []
    print(f"{len(BUGS) - len(missed)} of {len(BUGS)} planted bugs caught")
    assert not missed

"""The patch of docs/upstream.md applies to xfuser 0.7.0, and lets its own caches agree.

The slow test runs a patched copy of xfuser on two ranks over gloo.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.worlds import ROOT, run_world

PAGE = ROOT / "docs" / "upstream.md"
SPEC = importlib.util.find_spec("xfuser")
assert SPEC is not None and SPEC.origin is not None
INSTALLED = Path(SPEC.origin).parent


def patched(folder: Path, whole: bool) -> Path:
    """Return a folder with a copy of xfuser, all of it or what is patched, patched."""
    (patch,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for name in re.findall(r"^\+\+\+ b/(\S+)$", patch, re.MULTILINE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(INSTALLED.parent / name, folder / name)
    if whole:
        shutil.copytree(
            INSTALLED, folder / "xfuser", dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )  # fmt: skip
    subprocess.run(
        ["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch"],
        input=patch, text=True, cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder


def test_the_patch_applies_and_leaves_neither_broadcast_nor_barrier(tmp_path: Path) -> None:
    patched(tmp_path, whole=False)
    caches = tmp_path / "xfuser" / "model_executor" / "cache"
    for file in (caches / "utils.py", caches / "adapters" / "cache_dit.py"):
        source = file.read_text(encoding="utf-8")
        compile(source, str(file), "exec")
        assert not re.search(r"\.(broadcast|barrier)\(|ReduceOp\.AVG\)\s*$", source, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.gloo
def test_patched_caches_decide_alike_on_both_ranks_and_as_on_one(tmp_path: Path) -> None:
    def run(where: str, ranks: int) -> list[dict[str, Any]]:
        return list(run_world("upstream_worker.py", ranks, where).values())

    folder = str(patched(tmp_path, whole=True))
    assert not [name for name in sys.modules if name.startswith("xfuser.model_executor.cache")]
    (alone,) = run(folder, 1)
    one, other = run(folder, 2)
    assert one["distance"] == other["distance"] == alone["distance"]
    assert one["infinite"] == other["infinite"] == float("inf")
    assert one["decided"] == other["decided"] == alone["decided"]
    assert all(1 < len(computed) < 12 for computed in one["decided"].values()), one["decided"]
    assert one["called"] == other["called"] == []
    # As it is installed, the mean of means is another number where shards are uneven.
    assert run("installed", 2)[0]["distance"] != run("installed", 1)[0]["distance"]

"""The oldest and the newest diffusers that setup.py claims, each in an environment of its own.

    pytest -m slow tests/test_versions.py

Installs from the package index: minutes. Environments lie in FASTCACHE_VERSIONS, where that is set,
and are used again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.worlds import ROOT

# Hooks, imports, a generation of every toy uncached and cached, and two ranks.
SUBSET = (
    ("tests/test_packaging.py", "tests/test_hooks.py"),
    ("tests/test_compatibility.py", "-k", "float32 and holds"),
    ("tests/test_layouts.py", "-k", "ulysses and not pipefusion and not ring"),
)


def claimed() -> str:
    """Return the oldest diffusers that setup.py accepts."""
    (oldest,) = re.findall(r'"diffusers>=([\d.]+)"', (ROOT / "setup.py").read_text())
    return oldest


def test_the_readme_claims_what_setup_accepts() -> None:
    assert f"diffusers >= {claimed()}" in (ROOT / "README.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(os.environ.get("FASTCACHE_VERSIONS", tmp_path))


def run(*command: str | Path) -> str:
    """Run a command at the root of the repository; its output is the message where it fails."""
    quiet = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **quiet},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=2400,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("wanted", ["oldest", "newest"])
def test_a_subset_passes_with_the(wanted: str, folder: Path) -> None:
    python = folder / wanted / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder / wanted)
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    # First and pinned, as in scripts/setup.sh, so that no later requirement picks its own.
    run(*pip, f"torch=={version('torch').split('+')[0]}")
    run(*pip, 'triton; platform_system == "Linux"')
    exact = f"diffusers=={claimed()}" if wanted == "oldest" else "diffusers"
    run(*pip, "-U", "-e", ".[test]", exact)
    found = run(python, "-c", "import diffusers; print(diffusers.__version__)").strip()
    print(f"{wanted}: diffusers {found}")
    assert (found.startswith(claimed())) == (wanted == "oldest")
    for part in SUBSET:
        print(run(python, "-m", "pytest", "-q", *part).splitlines()[-1])

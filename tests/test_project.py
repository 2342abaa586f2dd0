"""The project's own files agree with each other, and the toys can be had from an sdist, too.

CPU. The slow test makes the sdist and writes the toys from it with what it holds alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.worlds import ROOT

import xfuser_fastcache
from xfuser_fastcache.calibration import checkout
from xfuser_fastcache.cli import main

TOYS = ("flux", "pixart", "sd3", "wan")


def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def commands(job: str) -> list[str]:
    return [step["run"] for step in workflow()[job]["steps"] if "run" in step]


def test_the_workflow_runs_what_ci_runs_and_every_python_that_is_claimed() -> None:
    assert commands("check") == ["bash .ci/run"]
    setup = (ROOT / "setup.py").read_text()
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', setup)
    assert workflow()["install"]["strategy"]["matrix"]["python"] == claimed
    assert f'python_requires=">={claimed[0]}"' in setup
    assert all(job["timeout-minutes"] for job in workflow().values())
    run = " ".join(line for job in workflow() for line in commands(job))
    scripts = re.findall(r"\S+\.sh", run)
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_pre_commit_runs_the_tools_as_the_checks_do() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    lines = (ROOT / "scripts" / "check.sh").read_text().splitlines()
    checks = [line.removesuffix(" &") for line in lines]
    assert repo["hooks"] and all(hook["entry"] in checks for hook in repo["hooks"])


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_an_image_copies_what_is_there_and_let_through(name: str) -> None:
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]]
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines()]
    assert copied and all((ROOT / path).exists() and path in let_through for path in copied)


def test_the_package_is_typed_and_says_where_it_runs() -> None:
    assert metadata("xfuser-fastcache")["Requires-Python"] == ">=3.10"
    assert "version=VERSION" in (ROOT / "setup.py").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", xfuser_fastcache.__version__)
    for package in ("xfuser_fastcache", "diffusers_adapters"):
        assert (ROOT / package / "py.typed").is_file()


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_toys_are_written_alike_from_a_checkout_and_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["toys", str(tmp_path / "checkout")]) == 0
    found = written(tmp_path / "checkout")
    assert {path.partition("/")[0] for path in found} == set(TOYS)
    assert "flux/fastcache.safetensors" in found and not [p for p in found if "training" in p]

    sdist = tmp_path / "xfuser_fastcache-0.tar"
    with tarfile.open(sdist, "w") as archive:
        archive.add(ROOT / "toys", "xfuser_fastcache-0/toys")
        archive.add(ROOT / "README.md", "xfuser_fastcache-0/toys/../../README.md")
    # As where the wheel is installed: no checkout around the package.
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    assert main(["toys", str(tmp_path / "archive"), "--source", str(sdist)]) == 0
    assert written(tmp_path / "archive") == found
    weights = "flux/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "archive" / weights).read_bytes() == (ROOT / "toys" / weights).read_bytes()
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "not in the wheel; give one of them by --source"),
        (("--source", "."), "not in the wheel"),
        (("--source", str(ROOT)), "File exists"),
    ],
)
def test_what_cannot_be_written_is_said_in_a_line(
    given: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "flux").mkdir(parents=True)
    assert main(["toys", "there", *given]) == 2
    assert said in capsys.readouterr().err
    assert written(tmp_path) == set()


@pytest.mark.slow
def test_the_sdist_brings_the_toys_and_what_it_is_made_of(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, files.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)],
        cwd=source, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {name for name in files.split("\0") if name and not name.startswith(".")}
    assert tracked <= inside
    assert main(["toys", str(tmp_path / "toys"), "--source", str(sdist)]) == 0
    assert {path.partition("/")[0] for path in written(tmp_path / "toys")} == set(TOYS)

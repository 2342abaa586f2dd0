"""What the wheel holds, and that its command works in an empty folder, without the checkout.

CPU. The slow tests install the wheel beside the packages of this environment, and use a copied toy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.worlds import OF_RANKS, ROOT

from xfuser_fastcache.calibration.prompts import AUDIT, CALIBRATE, shipped

Fastcache = Callable[..., subprocess.CompletedProcess[str]]


def test_the_wheel_holds_every_module_the_prompts_and_the_page(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    built = tmp_path / "lib"
    found = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    packages = [ROOT / "xfuser_fastcache", ROOT / "diffusers_adapters"]
    wanted = {p.relative_to(ROOT) for package in packages for p in package.rglob("*.py")}
    prompts = Path("xfuser_fastcache", "calibration", "prompts")
    typed = {package.relative_to(ROOT) / "py.typed" for package in packages}
    beside = {prompts / f"{use}.txt" for use in (CALIBRATE, AUDIT)}
    page = Path("xfuser_fastcache", "serving", "page")
    beside |= {page / name for name in ("index.html", "page.css", "page.js")}
    assert found == wanted | typed | beside
    # A wheel is such an archive of them, and must stay small enough to be no burden.
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", built)
    assert os.path.getsize(packed) < 2**20


def test_the_shipped_prompts_are_a_hundred_of_each_and_none_is_both() -> None:
    both = [*shipped(CALIBRATE), *shipped(AUDIT)]
    assert len(shipped(CALIBRATE)) == len(shipped(AUDIT)) == 100
    assert len(set(both)) == 200
    assert all(prompt.isascii() and 3 <= len(prompt.split()) <= 20 for prompt in both)


@pytest.fixture(scope="module")
def fastcache(tmp_path_factory: pytest.TempPathFactory) -> Fastcache:
    """The installed command, in an empty folder with a copy of the toy FLUX."""
    base = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source, site = base / "source", base / "site"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "toys", "tests"))
    quiet = {"check": True, "timeout": 300}
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(base), str(source)], **quiet
    )
    (wheel,) = base.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], **quiet)
    shutil.rmtree(source)
    empty = base / "empty"
    shutil.copytree(ROOT / "toys" / "flux", empty / "flux")
    (empty / "flux" / "fastcache.safetensors").unlink()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(site / "bin" / "fastcache"), *arguments],
            cwd=empty,
            env={**os.environ, **OF_RANKS, "PYTHONPATH": str(site), "MASTER_PORT": "29533"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.mark.slow
def test_the_command_works_without_the_checkout(fastcache: Fastcache) -> None:
    def run(*arguments: str) -> str:
        done = fastcache(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    report = json.loads(run("doctor", "--json"))
    assert {"fastcache layouts"} < {row["what"] for row in report["refused"]}
    assert {"flux", "sd3", "pixart", "xdit"} <= {row["name"] for row in report["registered"]}

    short = ("--num_inference_steps", "12")
    toy = ("--model", "flux", *short)
    prompt = ("--prompt", "a large red ring, top left, on dark blue")
    printed = run("generate", *toy, *prompt, "--use_cache", "Fast", "--baseline")
    assert "1 ranks, 1 digest(s)" in printed

    few = ("--significance_level", "0.5", "--moves", "1", "--batch_size", "4")
    made = ("--computed_steps", "10", "--output", "flux.safetensors")
    assert "written: flux.safetensors" in run("calibrate", *toy, *few, *made)
    printed = run("audit", "flux.safetensors", *toy, "--num_prompts", "3")
    assert "audit of flux.safetensors" in printed
    cached = ("--use_cache", "Fast", "--cache_config")
    options = '{"calibration": "flux.safetensors", "computed_steps": 10}'
    assert "16.7%" in run("generate", *toy, *prompt, *cached, options)


@pytest.mark.slow
def test_what_needs_the_checkout_says_so_in_a_line(fastcache: Fastcache) -> None:
    done = fastcache("layouts")
    assert done.returncode == 2
    assert "which a checkout of the project has" in done.stderr.splitlines()[-1]
    done = fastcache("calibrate", "--model", "flux", "--output", "x", "--num_prompts", "101")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fastcache calibrate: 101 prompts are needed")

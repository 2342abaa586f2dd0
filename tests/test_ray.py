"""xDiT's Ray path, two workers on the CPU: uncached as xfuser has it, and with the cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from support.worlds import ROOT

pytestmark = [pytest.mark.gloo, pytest.mark.slow]


def drive(*flags: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ray_driver.py"), *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_the_cache_works_in_ray_workers() -> None:
    done = drive()
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    print(line)
    said = json.loads(line.removeprefix("REPORT "))
    never, some = said["cached"]["0"], said["cached"]["0.5"]
    assert never["identical"]
    assert never["hits"] == [0, 0]
    assert 0 < some["difference"] < 0.2
    assert len(set(some["hits"])) == len(set(some["digests"])) == 1
    assert some["hits"][0] > 0
    assert said["restored"]


def test_without_the_cpu_platform_xdits_worker_wants_a_gpu() -> None:
    """The control of what the platform mends: `.to("cuda:0")` in `DiTWorker.from_pretrained`."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which is what the worker wants")
    done = drive("--leave_device")
    assert done.returncode != 0
    assert "xfuser/ray/worker/worker.py" in done.stderr
    # By the build of torch: without CUDA, or with it and without a driver.
    assert re.search("Torch not compiled with CUDA enabled|NVIDIA driver", done.stderr)
    print(done.stderr[-600:])

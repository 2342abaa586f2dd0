"""`xdit-fastcache`: xDiT's runner on the toys, which lie where its registry names point.

The runner loads `black-forest-labs/FLUX.1-dev` by that name; in a folder that has one of this
name, that is a path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.worlds import ROOT

HUB = {
    "black-forest-labs/FLUX.1-dev": "flux",
    "stabilityai/stable-diffusion-3.5-large": "sd3",
}
STEPS = 8
CALL = (
    "--prompt", "a large red ring, top left, on dark blue", "--height", "128", "--width", "128",
    "--num_inference_steps", str(STEPS), "--max_sequence_length", "32", "--seed", "1",
)  # fmt: skip
OPTIONS = ("--cache_config", '{"cache_ratio_threshold": 1.0}')
# What the console command runs, and what torchrun runs on each rank.
COMMAND = (sys.executable, "-c", "from xfuser_fastcache.xdit.runner import launch; launch()")
MODULE = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
    "-m", "xfuser_fastcache.xdit.runner",
)  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for name, toy in HUB.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(ROOT / "toys" / toy)
    return folder


def run(
    hub: Path, directory: Path, command: tuple[str, ...], *flags: str, timeout_s: float = 240
) -> tuple[int, str]:
    """Run a command in the folder of models; return its exit status and what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "LOG_LEVEL": "info",
        "MASTER_ADDR": "127.0.0.1",
    }
    done = subprocess.run(
        [*command, *CALL, "--output_directory", str(directory), *flags],
        cwd=hub,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    return done.returncode, done.stdout


def check(directory: Path, output: str, backend: str, steps: int = STEPS) -> None:
    """Check the pictures, statistics and timings that a cached run has left."""
    from PIL import Image

    pictures = list(directory.glob("*.png"))
    assert pictures, output
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.size == (128, 128)
    statistics = json.loads((directory / "cache_statistics.json").read_text())
    assert statistics["use_cache"] == backend
    assert statistics["steps"] == steps
    assert 0 < statistics["block_approx_ratio"] < 1
    assert statistics["collectives_per_step"] == 1
    timings = json.loads((directory / "timings.json").read_text())
    assert timings and all(seconds > 0 for seconds in timings)
    assert f"{backend}: {statistics['block_approx_ratio']:.1%} of the blocks skipped" in output


def free_port() -> str:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.gloo
def test_the_command_starts_the_ranks_and_flux_runs_cached(hub: Path, tmp_path: Path) -> None:
    status, output = run(
        hub, tmp_path, COMMAND, "--model", "FLUX.1-dev", "--ulysses_degree", "2",
        "--master_port", free_port(), "--cache_method", "fastcache", *OPTIONS,
    )  # fmt: skip
    assert status == 0, output
    assert list(tmp_path.glob("*_u2r1_*.png"))
    check(tmp_path, output, "Fast")


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("black-forest-labs/FLUX.1-dev", "--ulysses_degree 2"),
        ("FLUX.1-dev", "--ring_degree 2"),
        ("FLUX.1-dev", "--pipefusion_parallel_degree 2"),
        ("FLUX.1-dev", "--data_parallel_degree 2 --prompt red blue"),
        ("SD3.5", "--ulysses_degree 2"),
        ("stable-diffusion-3.5-large", "--use_cfg_parallel"),
        ("stabilityai/stable-diffusion-3.5-large", "--pipefusion_parallel_degree 2"),
    ],
)
def test_torchrun_starts_the_runner_in_every_layout(
    hub: Path, tmp_path: Path, model: str, flags: str
) -> None:
    status, output = run(
        hub, tmp_path, MODULE, "--model", model, *flags.split(), "--cache_method", "Fast",
        *OPTIONS, "--num_iterations", "2", "--warmup_calls", "1", timeout_s=600,
    )  # fmt: skip
    assert status == 0, output
    check(tmp_path, output, "Fast", 3 * STEPS)


@pytest.mark.gloo
@pytest.mark.slow
def test_without_a_cache_it_draws_what_a_threshold_of_0_draws(hub: Path, tmp_path: Path) -> None:
    from PIL import Image

    pictures = []
    flags = ("--model", "SD3.5", "--ulysses_degree", "2")
    never = ("--cache_method", "Fb", "--cache_config", '{"cache_ratio_threshold": 0}')
    for name, cache in (("uncached", ()), ("never", never)):
        status, output = run(hub, tmp_path / name, MODULE, *flags, *cache, timeout_s=600)
        assert status == 0, output
        (picture,) = (tmp_path / name).glob("*.png")
        with Image.open(picture) as image:
            pictures.append(image.tobytes())
    assert pictures[0] == pictures[1]
    assert not (tmp_path / "uncached" / "cache_statistics.json").exists()

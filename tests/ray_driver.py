"""xDiT's Ray path on two CPU workers with the toy FLUX, uncached and cached; prints one JSON line.

python tests/ray_driver.py                  # Ulysses 2
python tests/ray_driver.py --leave_device   # xfuser's own worker, which asks for a GPU
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from support.worlds import report  # noqa: E402

from xfuser_fastcache.xdit import cpu_platform  # noqa: E402

MODEL = str(ROOT / "toys" / "flux")
SIZE: dict[str, Any] = {
    "height": 128, "width": 128, "num_inference_steps": 8, "max_sequence_length": 32,
}  # fmt: skip


def prepare_worker() -> None:
    """Ray calls it in each worker before xfuser is imported there."""
    from xfuser_fastcache.xdit import cpu_platform

    if os.environ.get("LEAVE_DEVICE"):
        del cpu_platform.PATCHES["xfuser.ray.worker.worker"]
    cpu_platform.enable_cpu_platform()


def start(leave_device: bool) -> None:
    """Start Ray on this machine alone, with two GPUs that it only counts."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path[:2]),
    }  # fmt: skip
    if leave_device:
        environment["LEAVE_DEVICE"] = "1"
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": prepare_worker, "env_vars": environment},
    )


def load() -> Any:
    """Return xDiT's pipeline of two workers."""
    from xfuser import xFuserArgs, xFuserFluxPipeline
    from xfuser.ray.pipeline.pipeline_utils import RayDiffusionPipeline

    config, _ = xFuserArgs(
        model=MODEL, prompt=["a"], ulysses_degree=2, use_ray=True, ray_world_size=2, **SIZE
    ).create_config()
    config.runtime_config.dtype = torch.float32
    config.runtime_config.attention_backend = "SDPA"
    return RayDiffusionPipeline.from_pretrained(
        PipelineClass=xFuserFluxPipeline,
        pretrained_model_name_or_path=MODEL,
        engine_config=config,
        torch_dtype=torch.float32,
    )


def draw(pipe: Any) -> np.ndarray:
    """Return the picture of the one worker that has it."""
    outputs = pipe(
        prompt="a large red ring, top left, on dark blue",
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **SIZE,
    )
    (images,) = [output for output in outputs if output is not None]
    return images[0]


def main() -> None:
    """Draw uncached, cached, and uncached again."""
    cpu_platform.enable_cpu_platform()
    start("--leave_device" in sys.argv)
    pipe = load()
    from xfuser_fastcache.xdit.ray_path import (
        apply_cache_on_workers,
        get_worker_statistics,
        remove_cache_from_workers,
    )

    control = draw(pipe)
    found = {}
    for threshold in (0, 0.5):
        apply_cache_on_workers(pipe, use_cache="Fast", cache_ratio_threshold=threshold)
        cached = draw(pipe)
        statistics = get_worker_statistics(pipe)
        remove_cache_from_workers(pipe)
        found[str(threshold)] = {
            "identical": bool(np.array_equal(cached, control)),
            "difference": float(np.abs(cached - control).max()),
            "hits": [row["block_approx_ratio"] for row in statistics],
            "digests": [row["decisions_digest"] for row in statistics],
        }
    report(0, cached=found, restored=bool(np.array_equal(draw(pipe), control)))
    ray.shutdown()


if __name__ == "__main__":
    main()

"""The device and the software that figures were measured with."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = (
    *("triton", "diffusers", "transformers", "xfuser", "xfuser-fastcache", "cache-dit"),
    # Formats of weights, and offloading.
    *("accelerate", "torchao", "bitsandbytes", "gguf"),
)


def describe(device: torch.device) -> tuple[str, dict[str, Any]]:
    """Return the name of what the figures were measured on, and what else is known of it."""
    name = platform.processor() or platform.machine()
    found: dict[str, Any] = {
        "driver": None,
        "cuda": torch.version.cuda,
        "memory_bytes": None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        found["memory_bytes"] = properties.total_memory
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            found["driver"] = out.stdout.splitlines()[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            found["driver"] = f"not known: {type(error).__name__}"
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return name, found

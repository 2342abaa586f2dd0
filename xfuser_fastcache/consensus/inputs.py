"""A digest of what a call is given, to compare between ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


def digest_of(*given: Any, values: bool = True) -> str:
    """Return a digest of what a call is given: tensors by their bytes, generators by their state.

    What has no value to compare (callbacks, modules) is left out.

    Args:
        *given: arguments.
        values: False takes tensors by their shape and dtype and leaves generators out, so that
            nothing is read from a device.
    """
    found = hashlib.sha256()
    for value in given:
        _digest(value, found, values)
    return found.hexdigest()[:16]


def _digest(value: Any, found: Any, values: bool) -> None:
    if isinstance(value, torch.Generator):
        value = value.get_state() if values else None
    if isinstance(value, torch.Tensor):
        found.update(f"{tuple(value.shape)} {value.dtype}".encode())
        if values:
            held = value.detach().cpu().reshape(-1).view(torch.uint8)
            found.update(held.numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(key for key, held in value.items() if not callable(held)):
            found.update(repr(key).encode())
            _digest(value[key], found, values)
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}".encode())
        for item in value:
            _digest(item, found, values)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        found.update(repr(value).encode())

"""A digest of what a call is given, to compare between ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


def digest_of(*values: Any) -> str:
    """Return a digest of what a call is given: tensors by their bytes, generators by their state.

    What has no value to compare (callbacks, modules) is left out.
    """
    found = hashlib.sha256()
    for value in values:
        _digest(value, found)
    return found.hexdigest()[:16]


def _digest(value: Any, found: Any) -> None:
    if isinstance(value, torch.Generator):
        value = value.get_state()
    if isinstance(value, torch.Tensor):
        held = value.detach().cpu().contiguous()
        found.update(f"{tuple(held.shape)} {held.dtype}".encode())
        found.update(
            held.view(torch.uint8).numpy().tobytes() if held.dim() else repr(held).encode()
        )
    elif isinstance(value, Mapping):
        for key in sorted(key for key, held in value.items() if not callable(held)):
            found.update(repr(key).encode())
            _digest(value[key], found)
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}".encode())
        for item in value:
            _digest(item, found)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        found.update(repr(value).encode())

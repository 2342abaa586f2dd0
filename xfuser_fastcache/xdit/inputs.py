"""Tells the cache of a pipeline's calls: what they are given, and the errors that end them.

Between its stages and after its transformer, a pipeline of xfuser waits for other ranks and runs
its user's callbacks, which the hooks around the transformer do not see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any


def told(call: Callable[..., Any]) -> Callable[..., Any]:
    """Put the cache's word around a pipeline's `__call__`."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        from xfuser_fastcache.clock.ownership import TransformerInUse
        from xfuser_fastcache.hooks import hook_on

        hook = hook_on(self.transformer)
        if hook is None:
            return call(self, *args, **kwargs)
        hook.engine.begin(lambda: digest_of(args, kwargs))
        try:
            return call(self, *args, **kwargs)
        except TransformerInUse:
            raise
        except BaseException as error:
            hook.engine.abandon(error)
            raise

    return __call__


def digest_of(*values: Any) -> str:
    """Return a digest of what a call is given: tensors by their bytes, generators by their state.

    What has no value to compare (callbacks, modules) is left out.
    """
    found = hashlib.sha256()
    for value in values:
        _digest(value, found)
    return found.hexdigest()[:16]


def _digest(value: Any, found: Any) -> None:
    import torch

    if isinstance(value, torch.Generator):
        value = value.get_state()
    if isinstance(value, torch.Tensor):
        held = value.detach().cpu().contiguous()
        found.update(f"{tuple(held.shape)} {held.dtype}".encode())
        found.update(
            held.view(torch.uint8).numpy().tobytes() if held.dim() else repr(held).encode()
        )
    elif isinstance(value, Mapping):
        for key in sorted(value):
            found.update(repr(key).encode())
            _digest(value[key], found)
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}".encode())
        for item in value:
            _digest(item, found)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        found.update(repr(value).encode())

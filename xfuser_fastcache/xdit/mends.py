"""Bugs of xfuser 0.7.0 that stand between a model and a layout, mended where they are found."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from types import ModuleType
from typing import Any

from xfuser_fastcache.xdit.compat import check_xfuser_version, replace, require

logger = logging.getLogger("xfuser_fastcache")

_PROCESSOR = "xFuserJointAttnProcessor2_0"


def mend_xfuser() -> list[str]:
    """Mend what is known to be broken in the installed xfuser; call it before building a pipeline.

    Imports xfuser. A mended xfuser is recognised and left alone; calling again changes nothing.

    Returns:
        What was mended by this call, one line each.

    Raises:
        IncompatibleXfuserError: an xfuser that is not known.
    """
    check_xfuser_version()
    from xfuser.model_executor.layers import attention_processor

    mended = []
    if _updates_kv_cache_twice(attention_processor):
        _update_kv_cache_once(attention_processor)
        mended.append("SD3 under PipeFusion without sequence parallelism: KV cache updated twice")
    for line in mended:
        logger.info("mended in xfuser: %s", line)
    return mended


def _updates_kv_cache_twice(module: ModuleType) -> bool:
    """Recognise the bug: the processor fills the KV cache itself, then lets `USP` do it again.

    `USP` updates the cache of any layer it is handed that has one. The processor hands its layer on
    also where it has updated the cache just before, and the second update has another shape.
    """
    call = require(module, f"{_PROCESSOR}.__call__")
    if hasattr(call, "__wrapped__"):
        return False  # mended by an earlier call
    source = inspect.getsource(call)
    return "update_and_get_kv_cache" in source and "attn_layer=attn," in source


def _update_kv_cache_once(module: ModuleType) -> None:
    """Hide the layer from `USP` while the processor runs that has updated its cache itself."""
    updated = threading.local()
    call, usp = require(module, f"{_PROCESSOR}.__call__"), require(module, "USP")

    @functools.wraps(call)
    def call_and_say_so(self: Any, *args: Any, **kwargs: Any) -> Any:
        updated.here = not self.use_long_ctx_attn_kvcache
        try:
            return call(self, *args, **kwargs)
        finally:
            updated.here = False

    @functools.wraps(usp)
    def usp_with_one_update(*args: Any, attn_layer: Any = None, **kwargs: Any) -> Any:
        layer = None if getattr(updated, "here", False) else attn_layer
        return usp(*args, attn_layer=layer, **kwargs)

    replace(module, f"{_PROCESSOR}.__call__", call_and_say_so)
    replace(module, "USP", usp_with_one_update)

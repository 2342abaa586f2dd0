"""Sizes in a checkpoint's config that xfuser's transformers drop; see `mends`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from xfuser_fastcache.xdit.compat import replace, require


def drops_sizes(source: str) -> bool:
    """The constructor takes any keyword, and diffusers passes on what it names alone."""
    return "**kwargs" in source


def name_sizes(path: str, model_class: str) -> Callable[[ModuleType], None]:
    """Return what lets diffusers see which sizes a transformer takes.

    Without, every checkpoint is loaded as if it had the default ones.

    Args:
        path: of the constructor in xfuser's module.
        model_class: of diffusers, in that module too, whose sizes they are.
    """

    def apply(module: ModuleType) -> None:
        init = require(module, path)
        model: Any = require(module, model_class)

        @functools.wraps(init)
        def init_by_name(self: Any, **sizes: Any) -> None:
            init(self, **sizes)

        vars(init_by_name)["__signature__"] = inspect.signature(model.__init__)
        replace(module, path, init_by_name)

    return apply

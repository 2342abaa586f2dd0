"""What the code of a model says of itself: parameters in order, and what its blocks return."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn


@cache
def parameters_of(module_class: Any) -> tuple[str, ...]:
    """Return the names of a module's forward parameters, in order, without `self`.

    Of a subclass whose forward hands positional arguments on unnamed (`*args`), those of the class
    below it.

    Args:
        module_class: of the module.

    Example:
        >>> parameters_of(nn.Linear)
        ('input',)
    """
    return _parameters(module_class)


@cache
def _parameters(module_class: Any) -> tuple[str, ...]:
    bases = module_class.__mro__[: module_class.__mro__.index(nn.Module)]
    signatures = [
        list(inspect.signature(vars(base)["forward"]).parameters.values())[1:]
        for base in bases
        if "forward" in vars(base)
    ]
    named = [s for s in signatures if not any(p.kind is p.VAR_POSITIONAL for p in s)]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(p.name for p in (named or signatures)[0] if p.kind not in kinds)


def metadata_of(block_class: type[Any]) -> TransformerBlockMetadata | None:
    """Return what diffusers' own registry knows of a block, or None."""
    for base in block_class.__mro__:
        try:
            return TransformerBlockRegistry.get(base)
        except ValueError:
            continue
    return None

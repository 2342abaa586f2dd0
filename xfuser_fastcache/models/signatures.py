"""What the code of a model says of itself: parameters in order, and what its blocks return."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry


@cache
def parameters_of(module_class: Any) -> tuple[str, ...]:
    """Return the names of a module's forward parameters, in order, without `self`.

    Of a wrapper whose forward hands positional arguments on unnamed (`*args`), those of the class
    that it wraps.

    Example:
        >>> import torch
        >>> parameters_of(torch.nn.Linear)
        ('input',)
    """
    for base in module_class.__mro__:
        if "forward" not in vars(base):
            continue
        found = list(inspect.signature(vars(base)["forward"]).parameters.values())[1:]
        if not any(p.kind is p.VAR_POSITIONAL for p in found):
            return tuple(p.name for p in found if p.kind is not p.VAR_KEYWORD)
    raise ValueError(f"{module_class.__name__} has no forward whose parameters have names")


def metadata_of(block_class: type[Any]) -> TransformerBlockMetadata | None:
    """Return what diffusers' own registry knows of a block, or None."""
    for base in block_class.__mro__:
        try:
            return TransformerBlockRegistry.get(base)
        except ValueError:
            continue
    return None

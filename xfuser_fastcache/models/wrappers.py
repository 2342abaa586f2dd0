"""What stands around a module or in front of it: FSDP of both kinds, torch.compile, accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

# Where `torch.compile(module)` and FSDP1 keep what they stand around.
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside FSDP1's and torch.compile's wrappers, or the module itself.

    FSDP2 is no wrapper: it gives the module a class of its own, a subclass of the one before.
    """
    # What is no module has none; it is refused by its name later.
    held = getattr(module, "_modules", {})
    inner = next((held[name] for name in _INSIDE if name in held), None)
    return module if inner is None else unwrapped(inner)


def acts_in_call(module: nn.Module) -> bool:
    """Whether something happens in a module's call, before its forward, that a skip has to save.

    What was compiled, and FSDP2's hooks, which gather the weights from all ranks.
    """
    compiled = isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
    return compiled or isinstance(module, FSDPModule)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold a module's weights whole within; nothing where FSDP has not cut them.

    Of modules inside that FSDP has cut by themselves nothing is gathered. Where it gathers, it is
    a collective call of the ranks that share the weights.
    """
    inner = unwrapped(module)
    if isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
            yield
    elif isinstance(inner, FSDPModule):
        inner.unshard()
        try:
            yield
        finally:
            inner.reshard()
    else:
        yield


@contextmanager
def beneath_accelerate(module: nn.Module) -> Iterator[None]:
    """Let hooks be put on and taken off beneath accelerate's.

    diffusers takes accelerate's off and puts them on again after each generation (model CPU
    offload), and with them would go what stands on top of them.
    """
    if "_old_forward" not in module.__dict__:
        yield
        return
    wrapped: Any = module
    outer, wrapped.forward = wrapped.forward, wrapped._old_forward
    try:
        yield
    finally:
        wrapped._old_forward, wrapped.forward = wrapped.forward, outer

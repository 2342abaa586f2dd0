"""Puts the engine around a transformer and each of its blocks, on diffusers' own hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn

from xfuser_fastcache.engine import CacheEngine
from xfuser_fastcache.ownership import TransformerInUse

HOOK = "xfuser_fastcache"
BRANCH_HOOK = "xfuser_fastcache_branch"


class _BranchName(StateManager):
    """Receives the name that a pipeline gives a call by diffusers' `cache_context`.

    Each thread sees its own: one that is refused must not rename the other's call.
    """

    def __init__(self) -> None:
        super().__init__(BaseState)
        self._given = threading.local()

    @property
    def name(self) -> str | None:
        """The name of the call that this thread is about to make, or None."""
        return getattr(self._given, "name", None)

    def set_context(self, context: Any) -> None:
        # A name in diffusers 0.35, an object that carries it later.
        self._given.name = getattr(context, "name", context)


class TransformerHook(ModelHook):
    """Opens and closes a step around the transformer's forward.

    Args:
        attachment: that it is part of.
        engine: does the work.
        open_step: opens a step of the engine from the forward's arguments.
    """

    def __init__(self, attachment: Attachment, engine: CacheEngine, open_step: Callable[..., None]):
        super().__init__()
        self.attachment = attachment
        self.engine = engine
        self.open_step = open_step

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer within a step.

        Raises:
            TransformerInUse: the cache serves another thread's generation, which goes on unharmed.
        """
        with self.engine.ownership.visit():
            try:
                self.open_step(args, kwargs)
                forward = self.fn_ref.original_forward
                if self.engine.forecaster.whole_forward:
                    output = self.engine.run_block(0, forward, args, kwargs)
                else:
                    output = forward(*args, **kwargs)
                self.engine.close()
            except TransformerInUse:
                raise
            except BaseException as error:
                self.engine.abandon(error)
                raise
            return output


class BlockHook(ModelHook):
    """Lets the engine run a block or stand in for it.

    Args:
        engine: of the transformer.
        index: of the block among those that this rank holds.
    """

    def __init__(self, engine: CacheEngine, index: int):
        super().__init__()
        self.engine = engine
        self.index = index

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block through the engine."""
        return self.engine.run_block(self.index, self.fn_ref.original_forward, args, kwargs)


class AttentionHook(ModelHook):
    """Lets the engine run an attention module of a block.

    Args:
        engine: of the transformer.
        key: index of the block among those that this rank holds, and the module's name in it.
    """

    def __init__(self, engine: CacheEngine, key: tuple[int, str]):
        super().__init__()
        self.engine = engine
        self.key = key

    # In a compiled block, what is remembered of each module would be compiled for each of them.
    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module through the engine."""
        return self.engine.run_attention(self.key, self.fn_ref.original_forward, args, kwargs)


class BranchNameHook(ModelHook):
    """Receives the names of branches; alone stateful, since diffusers visits stateful hooks.

    It sits on a block: `cache_context` begins at the model inside xfuser's wrapper and looks for
    hooks below that.

    Args:
        branch_name: where the name is left.
    """

    _is_stateful = True

    def __init__(self, branch_name: _BranchName):
        super().__init__()
        self.branch_name = branch_name

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Nothing to do: the engine tells generations apart by itself, alike on all ranks."""
        return module


def _registry(module: nn.Module) -> HookRegistry:
    """Return the module's own registry.

    xfuser's wrappers hand attribute look-ups on to the model inside, whose registry would wrap a
    forward that the wrapper does not call; so only the module's own attribute counts.
    """
    if "_diffusers_hook" not in module.__dict__:
        module._diffusers_hook = HookRegistry(module)
    return module.__dict__["_diffusers_hook"]


def _forget_children(module: nn.Module) -> None:
    """Make diffusers look again for hooked modules below `module`, where it remembers them."""
    registry = module.__dict__.get("_diffusers_hook")
    forget = getattr(registry, "invalidate_child_registries_cache", None)
    if forget is not None:
        forget()


class Attachment:
    """The hooks on one transformer; `detach` restores it exactly.

    Args:
        transformer: whose forward the pipeline calls (perhaps xfuser's wrapper).
        model: the diffusers model that holds the blocks (perhaps the same module).
        blocks: the blocks that this rank holds, in order.
    """

    def __init__(self, transformer: nn.Module, model: nn.Module, blocks: list[nn.Module]):
        self.transformer = transformer
        self.model = model
        self.blocks = blocks
        self.branch_name = _BranchName()
        # Names that were in a module's own dictionary before; the hooks may add the others.
        self._before: dict[nn.Module, frozenset[str]] = {}

    def attach(self, engine: CacheEngine, open_step: Callable[..., None]) -> None:
        """Put the hooks on."""
        self._register(self.transformer, TransformerHook(self, engine, open_step))
        self._register(self.blocks[0], BranchNameHook(self.branch_name), BRANCH_HOOK)
        if not engine.forecaster.whole_forward:
            for index, block in enumerate(self.blocks):
                self._register(block, BlockHook(engine, index))
                for name, module in engine.attention_of(index, block).items():
                    self._register(module, AttentionHook(engine, (index, name)))
        _forget_children(self.model)

    def _register(self, module: nn.Module, hook: ModelHook, name: str = HOOK) -> None:
        self._before.setdefault(module, frozenset(module.__dict__))
        _registry(module).register_hook(hook, name)

    def detach(self) -> None:
        """Take the hooks off, and with them whatever registering them has left on the modules."""
        for module, before in self._before.items():
            registry = _registry(module)
            for name in (HOOK, BRANCH_HOOK):
                registry.remove_hook(name, recurse=False)
            if not registry.hooks:
                # remove_hook leaves the registry, and the bound method as an instance attribute.
                for name in {"_diffusers_hook", "forward"} - before:
                    module.__dict__.pop(name, None)
        _forget_children(self.model)


def hook_on(transformer: nn.Module) -> TransformerHook | None:
    """Return the cache's hook on `transformer`, or None."""
    registry = transformer.__dict__.get("_diffusers_hook")
    return registry.get_hook(HOOK) if registry is not None else None

"""Puts the engine around a transformer and each of its blocks, on diffusers' own hooks.

Where a module was compiled, by itself or by a wrapper in its place, the engine stands in front of
what was compiled: a hook within would be compiled with it, anew for each block. So all blocks of a
class share a graph as they do uncached, and a skipped block costs no compiled call. Nor are the
weights of a skipped block gathered where FSDP has cut them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, HookFunctionReference, StateManager
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from xfuser_fastcache.clock.clock import Reader
from xfuser_fastcache.clock.ownership import TransformerInUse
from xfuser_fastcache.engine import CacheEngine
from xfuser_fastcache.models.cache_note import CacheNote
from xfuser_fastcache.models.wrappers import acts_in_call, beneath_accelerate
from xfuser_fastcache.tokens.base import CannotForecast

HOOK = "xfuser_fastcache"
CONTEXT_HOOK = "xfuser_fastcache_context"

_COMPILE_INSTEAD = (
    "Compile its blocks in place, before or after the cache is applied: "
    "transformer.compile_repeated_blocks(), or block.compile() for each block. With "
    "forecaster='output' the whole transformer may be compiled in place, by "
    "transformer.compile() before the cache is applied."
)


def refuse_compiled(
    transformer: nn.Module, blocks: Iterable[nn.Module], whole_forward: bool
) -> None:
    """Refuse a transformer whose compiled code would run past the cache or contain it.

    Args:
        transformer: that is to be cached.
        blocks: of it; each of them may be wrapped by torch.compile.
        whole_forward: whether the forecaster stands in for the whole forward pass; then the
            transformer may be as well.

    Raises:
        ValueError: it says what to compile instead.
    """
    allowed = {*blocks, *([transformer] if whole_forward else [])}
    if any(is_compiled_module(part) and part not in allowed for part in transformer.modules()):
        what = "is wrapped by torch.compile(module), or holds modules that are"
    elif transformer._compiled_call_impl is not None and not whole_forward:
        what = "is compiled as a whole, which leaves nothing between its blocks"
    else:
        return
    raise ValueError(f"this {type(transformer).__name__} {what}. {_COMPILE_INSTEAD}")


@torch.compiler.disable
def _refuse_tracing(module: nn.Module) -> NoReturn:
    # Not compiled itself, so that its error ends the call in place of cutting the graph.
    raise RuntimeError(
        f"torch.compile reached into the cache: what calls this {type(module).__name__} is "
        "compiled, so that skipping would be compiled with it. Call remove_cache first. "
        f"{_COMPILE_INSTEAD}"
    )


class _Context(StateManager):
    """Receives what a pipeline says of a call by diffusers' `cache_context`.

    Each thread sees its own: one that is refused must not rename the other's call.
    """

    def __init__(self) -> None:
        super().__init__(BaseState)
        self._given = threading.local()

    @property
    def given(self) -> Any:
        """What is said of the call that this thread is about to make, or None."""
        return getattr(self._given, "context", None)

    def set_context(self, context: Any) -> None:
        self._given.context = context


class _CacheHook(ModelHook):
    """Any hook of a cache: it is never copied or saved with its module."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "this transformer carries a step cache, which belongs to this process and is neither "
            "copied nor pickled. Call remove_cache(transformer) first, copy or save it, and apply "
            "the cache again; save_pretrained and state_dict leave the cache out by themselves."
        )


class TransformerHook(_CacheHook):
    """Opens and closes a step around the transformer's forward.

    Args:
        attachment: that it is part of.
        engine: does the work.
        reader: tells the clock what it has to know of a forward pass.
    """

    def __init__(self, attachment: Attachment, engine: CacheEngine, reader: Reader):
        super().__init__()
        self.attachment = attachment
        self.engine = engine
        self.reader = reader

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer within a step.

        Raises:
            TransformerInUse: the cache serves another thread's generation, which goes on unharmed.
            RuntimeError: it is being compiled as a whole.
        """
        if torch.compiler.is_compiling():
            _refuse_tracing(module)
        self.attachment.follow_compilation()
        self.attachment.note.warn(self.engine.config.use_cache)
        engine = self.engine
        with engine.clock.ownership.visit(self.reader.scheduler.pass_over):
            try:
                engine.open(self.reader.arrival(args, kwargs, self.attachment.context.given))
                try:
                    output = self._run(args, kwargs)
                    engine.close()
                except CannotForecast:
                    engine.recompute()
                    output = self._run(args, kwargs)
                    engine.close()
            except TransformerInUse:
                raise
            except BaseException as error:
                engine.abandon(error)
                raise
            return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self.fn_ref.original_forward
        if self.engine.forecaster.whole_forward:
            return self.engine.run_block(0, forward, args, kwargs)
        return forward(*args, **kwargs)


class BlockHook(_CacheHook):
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
        """Run the block through the engine.

        Raises:
            RuntimeError: the transformer around it is being compiled as a whole.
        """
        if torch.compiler.is_compiling():
            _refuse_tracing(module)
        return self.engine.run_block(self.index, self.fn_ref.original_forward, args, kwargs)


class AttentionHook(_CacheHook):
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


class ContextHook(_CacheHook):
    """Receives what is said of calls; alone stateful, since diffusers visits stateful hooks.

    It sits below the model, since `cache_context` begins at the model inside xfuser's wrapper and
    looks for hooks below that; and on no block, so that a compiled block stays as it was.

    Args:
        context: where it is left.
    """

    _is_stateful = True

    def __init__(self, context: _Context):
        super().__init__()
        self.context = context

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Nothing to do: the engine tells generations apart by itself, alike on all ranks."""
        return module


class _Call:
    """Takes the place of a module's call, and leaves all that happens in it as it was.

    torch calls what `module.compile()` has left on the module in place of its hooks and forward; so
    this stands there. Set past `__setattr__`, which torch.compile's wrapper hands on inside.

    Args:
        module: of which something happens in its call; see `acts_in_call`.
        hook: goes around the call.
    """

    NAME = "_compiled_call_impl"

    def __init__(self, module: nn.Module, hook: ModelHook):
        self.module = module
        self.hook = hook
        self.compiled = module._compiled_call_impl
        hook.fn_ref = HookFunctionReference()
        hook.fn_ref.original_forward = self.compiled or module._call_impl
        vars(module)[self.NAME] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hook.new_forward(self.module, *args, **kwargs)

    @classmethod
    def of(cls, module: nn.Module) -> _Call | None:
        """Return what stands in a module's place, or None."""
        found = vars(module).get(cls.NAME)
        return found if isinstance(found, cls) else None

    def leave(self) -> None:
        """Give the place back."""
        if self.compiled is None:
            del vars(self.module)[self.NAME]
        else:
            vars(self.module)[self.NAME] = self.compiled


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
        embedder: a module of the model that is no block, for the names of branches.
    """

    def __init__(
        self,
        transformer: nn.Module,
        model: nn.Module,
        blocks: list[nn.Module],
        embedder: nn.Module,
    ):
        self.transformer = transformer
        self.model = model
        self.blocks = blocks
        self.embedder = embedder
        self.context = _Context()
        # Names that were in a module's own dictionary before; the hooks may add the others.
        self._before: dict[nn.Module, frozenset[str]] = {}
        self._block_hooks: list[tuple[nn.Module, BlockHook]] = []
        # Modules in front of whose call we stand.
        self._called: list[nn.Module] = []
        self.note = CacheNote(model)

    def attach(self, engine: CacheEngine, reader: Reader) -> None:
        """Put the hooks on, all or none."""
        self.note.warn(engine.config.use_cache)
        try:
            self._attach(engine, reader)
        except BaseException:
            self.detach()
            raise

    def _attach(self, engine: CacheEngine, reader: Reader) -> None:
        self._put(self.transformer, TransformerHook(self, engine, reader))
        self._register(self.embedder, ContextHook(self.context), CONTEXT_HOOK)
        if not engine.forecaster.whole_forward:
            for index, block in enumerate(self.blocks):
                hook = BlockHook(engine, index)
                self._put(block, hook)
                self._block_hooks.append((block, hook))
                for name, module in engine.attention_of(index, block).items():
                    self._register(module, AttentionHook(engine, (index, name)))
        self.note.write(engine.config)
        _forget_children(self.model)

    def follow_compilation(self) -> None:
        """Go around what blocks have been compiled to since the hooks were put on."""
        for block, hook in self._block_hooks:
            compiled = block._compiled_call_impl
            if compiled is not None and _Call.of(block) is None:
                self._unregister(block)
                self._put(block, hook)

    def _put(self, module: nn.Module, hook: ModelHook) -> None:
        if acts_in_call(module):
            _Call(module, hook)
            self._called.append(module)
        else:
            self._register(module, hook)

    def _register(self, module: nn.Module, hook: ModelHook, name: str = HOOK) -> None:
        self._before.setdefault(module, frozenset(module.__dict__))
        with beneath_accelerate(module):
            _registry(module).register_hook(hook, name)

    def _unregister(self, module: nn.Module) -> None:
        """Take our hooks off a module, and whatever registering them has left on it."""
        before = self._before.pop(module, None)
        if before is None:
            return
        registry = _registry(module)
        with beneath_accelerate(module):
            for name in (HOOK, CONTEXT_HOOK):
                registry.remove_hook(name, recurse=False)
            if not registry.hooks:
                # remove_hook leaves the registry, and the bound method as an instance attribute.
                for name in {"_diffusers_hook", "forward"} - before:
                    module.__dict__.pop(name, None)

    def detach(self) -> None:
        """Take the hooks off."""
        self.note.erase()
        for module in list(self._before):
            self._unregister(module)
        for module in self._called:
            call = _Call.of(module)
            if call is not None:
                call.leave()
        _forget_children(self.model)


def hook_on(transformer: nn.Module) -> TransformerHook | None:
    """Return the cache's hook on `transformer`, or None."""
    call = _Call.of(transformer)
    if call is not None:
        return call.hook
    registry = transformer.__dict__.get("_diffusers_hook")
    return registry.get_hook(HOOK) if registry is not None else None

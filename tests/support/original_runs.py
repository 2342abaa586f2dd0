"""A tiny pipeline that says which steps were computed, under whatever cache it carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import nn

from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import apply_cache_on_transformer, remove_cache
from xfuser_fastcache.hooks import hook_on

STEPS = 16


class _Behind(nn.Module):
    """Stands in a pipeline before its transformer, which no pipeline holds then."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.inner = transformer

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            return super().__getattr__(name)
        return getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Generator:
    """A tiny pipeline that repeats one generation and notes which steps ran its last block."""

    def __init__(self, model: str):
        self.pipe, self.call = TINY_PIPELINES[model]()
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer
        self.blocks = [
            block
            for name in ("transformer_blocks", "single_transformer_blocks")
            for block in getattr(self.transformer, name, ())
        ]
        self.computed: list[int] = []
        self._step = -1
        # A module that the last block always runs, and no cache replaces.
        last = self.blocks[-1]
        inner = getattr(last, "attn", None) or last.attn1
        inner.register_forward_pre_hook(lambda *_: self.computed.append(self._step))
        self.transformer.register_forward_pre_hook(self._begin_step)

    def _begin_step(self, *_: Any) -> None:
        self._step += 1

    def __call__(self, **changes: Any) -> torch.Tensor:
        self.computed, self._step = [], -1
        call = {**self.call, "num_inference_steps": STEPS, **changes}
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            return self.pipe(**{**call, "generator": generator}).images

    @contextmanager
    def ours(self, scheduler: bool = False, **options: Any) -> Iterator[None]:
        """Without a scheduler the number of steps is unknown, so the last is not forced."""
        if not scheduler:
            self.pipe.transformer = _Behind(self.transformer)
        apply_cache_on_transformer(self.transformer, **options)
        try:
            yield
        finally:
            remove_cache(self.transformer)
            self.pipe.transformer = self.transformer

    @contextmanager
    def diffusers(self, apply: Callable[..., None], config: Any) -> Iterator[None]:
        """diffusers' own cache, entered as `cache_context` does, which only FLUX has."""
        apply(self.transformer, config)
        registry = HookRegistry.check_if_exists_or_initialize(self.transformer)
        registry.invalidate_child_registries_cache()
        _set_cache_context(self.transformer, CacheContext("cond"))
        yield

    def statistics(self) -> list[float | None]:
        """What our gate weighed in the last span at each step."""
        decisions = hook_on(self.transformer).engine.decisions.decisions
        return [decision.judgements[-1].statistic for decision in decisions]

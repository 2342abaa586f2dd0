"""Mends of attention across ranks, for more than one family: keys twice, text twice, padding."""

from __future__ import annotations

import functools
import importlib
import math
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from xfuser_fastcache.xdit.compat import replace, require

Apply = Callable[[ModuleType], None]


def updates_kv_cache_twice(source: str) -> bool:
    """The processor fills the KV cache itself, then lets `USP` do it again.

    `USP` updates the cache of any layer it is handed that has one. The processor hands its layer on
    also where it has updated the cache just before, and the second update has another shape.
    """
    hands_on = ("attn_layer=attn,", "attn_layer=attn)", "attn_layer=attn\n")
    return "update_and_get_kv_cache" in source and any(end in source for end in hands_on)


def update_kv_cache_once(processor: str) -> Apply:
    """Return what hides the layer from `USP` while a processor runs that updates its cache."""

    def apply(module: ModuleType) -> None:
        updated = threading.local()
        call, usp = require(module, processor), require(module, "USP")

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

        replace(module, processor, call_and_say_so)
        replace(module, "USP", usp_with_one_update)

    return apply


def counts_text_on_every_rank(source: str) -> bool:
    """Text that is not split over the ranks is set apart for `USP` only where there are patches."""
    return any(
        f"{asked} get_runtime_state().num_pipeline_patch > 1{end}" in source
        for asked, end in (
            ("uses_pipeline_parallelism =", "\n"),
            ("if", " and not distri_cache_updated:\n"),
        )
    )


def count_text_once(*transformers: str) -> Apply:
    """Return what sets the text apart before `USP` where every rank holds all of it.

    Otherwise `USP` takes the copies of all ranks for different tokens, and each is attended to as
    often as there are ranks.

    Args:
        *transformers: classes whose forward tells how much text there is.
    """

    def apply(module: ModuleType) -> None:
        text = threading.local()
        usp = require(module, "USP")
        get_runtime_state = require(module, "get_runtime_state")
        sequence_parallel_ranks = require(module, "get_sequence_parallel_world_size")

        def counting(forward: Any) -> Any:
            @functools.wraps(forward)
            def forward_and_count_text(
                self: Any, hidden_states: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any
            ) -> Any:
                text.tokens = encoder_hidden_states.shape[1]
                try:
                    return forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)
                finally:
                    text.tokens = 0

            return forward_and_count_text

        @functools.wraps(usp)
        def usp_with_text_apart(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = getattr(text, "tokens", 0)
            if (
                tokens
                and "joint_strategy" not in kwargs
                and not get_runtime_state().split_text_embed_in_sp
                and sequence_parallel_ranks() > 1
            ):
                kwargs["joint_strategy"] = "front"
                for name, heads in (("query", query), ("key", key), ("value", value)):
                    kwargs[f"joint_{name}"] = heads[:, :, :tokens]
                query, key, value = (heads[:, :, tokens:] for heads in (query, key, value))
            return usp(query, key, value, *args, **kwargs)

        for transformer in transformers:
            path = f"{transformer}.forward"
            replace(module, path, counting(require(module, path)))
        replace(module, "USP", usp_with_text_apart)

    return apply


def remembers_by_rank(source: str) -> bool:
    """Whole keys are laid down rank by rank, where those of a patch are put patch by patch."""
    ranks, patches = (source.find(f"for {loop} in range(") for loop in ("rank", "pp_patch_idx"))
    return 0 <= ranks < patches


def remember_by_patch(module: ModuleType) -> None:
    """Lay whole keys and values down in the order in which patches replace them.

    Otherwise the first patch behind PipeFusion's synchronous steps replaces another one's too, and
    attends to its own tokens of the step before.
    """
    path = "CacheManager._sequence_parallel_cache_update"
    update = require(module, path)
    parallel = importlib.import_module("xfuser.core.distributed")

    @functools.wraps(update)
    def update_by_patch(
        self: Any, new_kv: Any, layer: Any, slice_dim: int = 1, layer_type: str = "attn"
    ) -> Any:
        found = update(self, new_kv, layer, slice_dim, layer_type)
        state = parallel.get_runtime_state()
        if state.num_pipeline_patch == 1 or state.patch_mode:
            return found
        ranks = found.chunk(parallel.get_ulysses_parallel_world_size(), dim=slice_dim)
        patches = zip(
            *(rank.split(state.pp_patches_token_num, dim=slice_dim) for rank in ranks), strict=True
        )
        found = torch.cat([part for patch in patches for part in patch], dim=slice_dim)
        self.cache[layer_type, layer].tensors[0] = found
        return found

    replace(module, path, update_by_patch)


def attends_to_padding(source: str) -> bool:
    """Tokens are padded to a multiple of the ranks, and nobody tells `USP` which ones are real."""
    pads = "pad_amount" in source or "padding_length" in source
    return pads and "valid_kv_len" not in source


def patches(self: Any, hidden_states: Any, *_args: Any, **_kwargs: Any) -> tuple[int, int]:
    """Return the tokens of a video's latents, and none that stand beside them."""
    sizes = zip(hidden_states.shape[2:], self.config.patch_size, strict=True)
    return math.prod(size // patch for size, patch in sizes), 0


def attend_to_real_tokens(
    transformer: str, processors: str, tokens_of: Callable[..., tuple[int, int]]
) -> Apply:
    """Return what tells `USP` how many keys are real while a transformer's forward runs.

    Otherwise all tokens attend to zeros, and the picture is another one. Under ring attention each
    rank has keys of its own, of which `USP` would cut as many: there it stays as it is.

    Args:
        transformer: class in the module that is mended.
        processors: module whose `USP` its attention calls.
        tokens_of: from the forward's arguments, tokens that are shared by the ranks and padded, and
            others that the ranks share beside them.
    """
    path = f"{transformer}.forward"

    def apply(module: ModuleType) -> None:
        processor = importlib.import_module(processors)
        forward, usp = require(module, path), require(processor, "USP")
        parallel = importlib.import_module("xfuser.core.distributed")
        real = threading.local()

        @functools.wraps(forward)
        def forward_and_count(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            tokens, beside = tokens_of(self, hidden_states, *args, **kwargs)
            ranks = parallel.get_sequence_parallel_world_size()
            # On more ranks than that some hold nothing else, between whose tokens others may stand.
            padding = -tokens % ranks
            padded = 0 < padding <= -(-tokens // ranks)
            in_rings = parallel.get_ring_parallel_world_size() > 1
            real.tokens = tokens + beside if padded and not in_rings else None
            try:
                return forward(self, hidden_states, *args, **kwargs)
            finally:
                real.tokens = None

        @functools.wraps(usp)
        def usp_of_real_tokens(*args: Any, attention_kwargs: Any = None, **kwargs: Any) -> Any:
            tokens = getattr(real, "tokens", None)
            if tokens is not None:
                attention_kwargs = {**(attention_kwargs or {}), "valid_kv_len": tokens}
            return usp(*args, attention_kwargs=attention_kwargs, **kwargs)

        replace(module, path, forward_and_count)
        replace(processor, "USP", usp_of_real_tokens)

    return apply

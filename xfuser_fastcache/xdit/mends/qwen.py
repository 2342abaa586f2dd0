"""Bugs of xfuser's Qwen-Image, which cuts tokens and text by itself; see `mends`."""

from __future__ import annotations

import functools
import importlib
import threading
from types import ModuleType
from typing import Any

import torch

from xfuser_fastcache.xdit.compat import replace, require

TRANSFORMER = "xFuserQwenImageTransformerWrapper"
MODULE = "xfuser.model_executor.models.transformers.transformer_qwen"
_USP = "xfuser.model_executor.layers.usp"
_TRIM = "_trim_trailing_kv_padding"
# In USP's arguments of an attention: which keys are real, by their places after the exchange.
_REAL_KEYS = "xfuser_fastcache_real_keys"


def real_keys(ranks: int, *parts: int) -> list[int] | None:
    """Return the places of real keys where each rank holds a piece of each part, padded alike.

    Args:
        ranks: that exchange them; the keys of one rank stand behind those of the one before.
        *parts: real tokens of each part, of all ranks.

    Returns:
        None where no part is padded.

    Example:
        >>> real_keys(2, 3, 2)
        [0, 1, 2, 3, 5]
    """
    pieces = [-(-tokens // ranks) for tokens in parts]
    if all(piece * ranks == tokens for piece, tokens in zip(pieces, parts, strict=True)):
        return None
    real = [
        rank * piece + row < tokens
        for rank in range(ranks)
        for piece, tokens in zip(pieces, parts, strict=True)
        for row in range(piece)
    ]
    return [place for place, is_real in enumerate(real) if is_real]


def attend_to_real_tokens(module: ModuleType) -> None:
    """Tell `USP` which keys are real while the transformer's forward runs.

    Otherwise all tokens attend to the zeros that pad text and image, and the picture is another
    one. Padding of text stands in between, where `USP` itself cannot leave keys out. Under ring
    attention each rank has keys of its own, and all have to have as many: there it stays as it is.
    """
    path, usp_module = f"{TRANSFORMER}.forward", importlib.import_module(_USP)
    forward, usp, trim = require(module, path), require(module, "USP"), require(usp_module, _TRIM)
    parallel = importlib.import_module("xfuser.core.distributed")
    real = threading.local()

    @functools.wraps(forward)
    def forward_and_count(
        self: Any, hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        ranks = parallel.get_sequence_parallel_world_size()
        found = None
        if ranks > 1 and parallel.get_ring_parallel_world_size() == 1:
            found = real_keys(ranks, encoder_hidden_states.shape[1], hidden_states.shape[1])
        keys = None if found is None else torch.tensor(found, device=hidden_states.device)
        real.keys = keys
        try:
            return forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)
        finally:
            real.keys = None

    @functools.wraps(usp)
    def usp_of_real_tokens(*args: Any, attention_kwargs: Any = None, **kwargs: Any) -> Any:
        keys = getattr(real, "keys", None)
        if keys is not None:
            attention_kwargs = {**(attention_kwargs or {}), _REAL_KEYS: keys}
        return usp(*args, attention_kwargs=attention_kwargs, **kwargs)

    @functools.wraps(trim)
    def trim_all(key: Any, value: Any, attention_kwargs: Any) -> Any:
        keys = (attention_kwargs or {}).get(_REAL_KEYS)
        if keys is not None:
            return key.index_select(2, keys), value.index_select(2, keys)
        return trim(key, value, attention_kwargs)

    replace(module, path, forward_and_count)
    replace(module, "USP", usp_of_real_tokens)
    replace(usp_module, _TRIM, trim_all)


def leaves_index_whole(source: str) -> bool:
    """Tokens are cut, and the index that tells which of them are a condition's is not."""
    return "modulate_index" in source and "modulate_index = chunk" not in source


def cut_index(module: ModuleType) -> None:
    """Give each block this rank's part of the index; otherwise its first block crashes."""
    path = f"{TRANSFORMER}.__init__"
    init, chunk = require(module, path), require(module, "chunk_and_pad_sequence")
    rank, size = (
        require(module, f"get_sequence_parallel_{name}") for name in ("rank", "world_size")
    )

    def own_rows(block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        index, ranks = kwargs.get("modulate_index"), size()
        if index is not None and index.shape[1] != kwargs["hidden_states"].shape[1]:
            padding = -index.shape[1] % ranks
            kwargs["modulate_index"] = chunk(index, rank(), ranks, padding, dim=1)
        return args, kwargs

    @functools.wraps(init)
    def init_and_cut(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.zero_cond_t:
            for block in self.transformer_blocks:
                block.register_forward_pre_hook(own_rows, with_kwargs=True)

    replace(module, path, init_and_cut)

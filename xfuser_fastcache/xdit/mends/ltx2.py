"""Bugs of xfuser's LTX-2; see `mends`."""

from __future__ import annotations

import functools
import threading
from types import ModuleType
from typing import Any

from xfuser_fastcache.xdit.compat import replace, require
from xfuser_fastcache.xdit.mends import attention

MODULE = "xfuser.model_executor.models.transformers.transformer_ltx2"
TRANSFORMER = "xFuserLTX2VideoTransformer3DWrapper"
_PROCESSORS = ("xFuserLTX2PerturbedAttnProcessor", "xFuserLTX2AudioVideoAttnProcessor")


def _tokens(self: Any, hidden_states: Any, *_args: Any, **_kwargs: Any) -> tuple[int, int]:
    """Return the video's tokens; the audio's attend among themselves."""
    return hidden_states.shape[1], 0


def attend_to_real_tokens(module: ModuleType) -> None:
    """Let neither the video nor the audio attend to the padding of the video's tokens.

    The video's own attention is `USP`'s. The audio's to the video runs whole on every rank, on keys
    that it has gathered: of those the last ones are left out.
    """
    attention.attend_to_real_tokens(TRANSFORMER, MODULE, _tokens)(module)
    forward, attend = require(module, f"{TRANSFORMER}.forward"), require(module, "attention")
    real = threading.local()

    @functools.wraps(forward)
    def forward_and_count(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        real.tokens = hidden_states.shape[1]
        try:
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            real.tokens = None

    @functools.wraps(attend)
    def attend_to_real(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = getattr(real, "tokens", None) if getattr(real, "gathers", False) else None
        key, value = (heads[:, :, :tokens] for heads in (key, value))
        return attend(query, key, value, *args, **kwargs)

    def saying_what_it_gathers(call: Any) -> Any:
        @functools.wraps(call)
        def call_and_say(self: Any, *args: Any, **kwargs: Any) -> Any:
            real.gathers = self.gather_kv
            try:
                return call(self, *args, **kwargs)
            finally:
                real.gathers = False

        return call_and_say

    for name in _PROCESSORS:
        path = f"{name}.__call__"
        replace(module, path, saying_what_it_gathers(require(module, path)))
    replace(module, f"{TRANSFORMER}.forward", forward_and_count)
    replace(module, "attention", attend_to_real)

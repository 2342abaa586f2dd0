"""Bugs of xfuser's Z-Image; see `mends`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from diffusers.utils import apply_lora_scale

from xfuser_fastcache.xdit.compat import replace, require

MODULE = "xfuser.model_executor.models.transformers.transformer_z_image"
FORWARD = "xFuserZImageTransformer2DWrapper.forward"


def take_attention_kwargs(module: ModuleType) -> None:
    """Take `joint_attention_kwargs`, which diffusers' pipeline gives since 0.42.

    Of it the scale of LoRA layers alone is used.
    """
    forward = require(module, FORWARD)

    @functools.wraps(forward)
    def forward_with_scale(
        self: Any, *args: Any, joint_attention_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        return forward(self, *args, **kwargs)

    replace(module, FORWARD, apply_lora_scale("joint_attention_kwargs")(forward_with_scale))

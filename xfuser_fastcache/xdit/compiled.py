"""What xDiT's `--use_torch_compile` leaves of a transformer, brought into a form that has gaps."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from xfuser_fastcache.apply import adapter_of, denoisers_of
from xfuser_fastcache.assembly import Request, blocks_held
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.consensus.topology import Layout
from xfuser_fastcache.models.wrappers import unwrapped

logger = logging.getLogger("xfuser_fastcache")


def compile_by_blocks(pipe: Any, config: CacheConfig, layout: Layout) -> None:
    """Compile denoisers block by block where xDiT has compiled them as a whole.

    Its pipelines compile the transformer's forward, and its runner some models, in which a cache
    finds nothing between blocks. Where the forecaster stands in for the whole forward pass it needs
    nothing there, and what was compiled stays.

    Args:
        pipe: a diffusers pipeline, or xfuser's class around one.
        config: of the cache that is about to be put on.
        layout: knows the model in a wrapper.
    """
    inner = getattr(pipe, "module", pipe)
    for name, denoiser in denoisers_of(pipe).items():
        plain = unwrapped(denoiser)
        adapter = adapter_of(layout.model_of(denoiser))
        if not _compiled_as_a_whole(denoiser) or Request.of(config, adapter).whole_forward:
            continue
        plain._compiled_call_impl = None
        plain.forward = getattr(plain.forward, _ORIGINAL, plain.forward)
        setattr(inner, name, plain)
        model = layout.model_of(plain)
        for listed in blocks_held(model, adapter).values():
            for block in listed:
                block.compile()
        logger.info(
            "The %s was compiled as a whole, which leaves a cache nothing between its blocks; they "
            "are compiled one by one instead.",
            type(model).__name__,
        )


# Where torch.compile keeps the function that it has compiled.
_ORIGINAL = "_torchdynamo_orig_callable"


def _compiled_as_a_whole(denoiser: nn.Module) -> bool:
    plain = unwrapped(denoiser)
    return (
        "_orig_mod" in denoiser._modules
        or plain._compiled_call_impl is not None
        or hasattr(plain.forward, _ORIGINAL)
    )

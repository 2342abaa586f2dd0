"""Tiny pipelines with random weights in the layouts of xDiT: which run there, and how."""

from __future__ import annotations

from typing import Any

from diffusers_adapters.tiny import TINY_MODELS
from xfuser_fastcache.benchmarks import layouts
from xfuser_fastcache.benchmarks.layouts import EXCLUDED, PIPEFUSION, ULYSSES
from xfuser_fastcache.xdit.loaded import put_in_layout

STEPS = 8
# Eight blocks: a stage of PipeFusion 4 must not be empty.
SIZES: dict[str, dict[str, int]] = {
    family: {"num_layers": 4, "num_single_layers": 4}
    for family, tiny in TINY_MODELS.items()
    if tiny.adapter == "flux"
} | {"hunyuan-dit": {"num_layers": 8}}
# Ranks and flags of xDiT, beside the layouts that toys are measured in.
_RING, _STAGES = "--ring_degree=2", f"{PIPEFUSION}=2"
_MORE: dict[str, tuple[int, tuple[str, ...]]] = {
    "ulysses 2 x ring 2": (4, (ULYSSES, _RING)),
    "pipefusion 2 x ring 2": (4, (_STAGES, _RING)),
    "pipefusion 3": (3, (f"{PIPEFUSION}=3",)),
}


def runs_in(family: str, flags: tuple[str, ...]) -> bool:
    """Say whether xDiT itself runs a tiny pipeline in a layout.

    Args:
        family: a name of `TINY_MODELS`.
        flags: of xDiT, such as ``--ring_degree=2``.
    """
    tiny, asked = TINY_MODELS[family], {flag.split("=")[0] for flag in flags}
    if tiny.alone and "--data_parallel_degree" in asked:
        return False
    known = {e.flag for e in EXCLUDED if e.model == tiny.adapter} - set(tiny.beyond)
    refused = known | {limit.flag for limit in tiny.limits}
    return not asked & {flag.split("=")[0] for flag in refused}


def _fields(flags: tuple[str, ...]) -> dict[str, Any]:
    named = (flag.strip("-").partition("=") for flag in flags)
    return {name: int(value) if value else True for name, _, value in named}


def _families(name: str, flags: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(family for family in TINY_MODELS if runs_in(family, flags))
    # The others have four blocks, two a stage, and none for the third.
    return tuple(f for f in found if f in SIZES) if name == "pipefusion 3" else found


# Name -> ranks, fields of `xFuserArgs`, and the families that xDiT runs so.
LAYOUTS: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    name: (ranks, _fields(flags), _families(name, flags))
    for name, (ranks, flags) in (layouts.LAYOUTS | _MORE).items()
    if ranks > 1
}


def build(family: str, **flags: Any) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline as xDiT has it, and the arguments of one call; equal on all ranks.

    Args:
        family: a name of `TINY_MODELS`.
        **flags: fields of `xFuserArgs`, degrees of parallelism among them.
    """
    pipeline, call = TINY_MODELS[family].make(**SIZES.get(family, {}))
    pipeline.set_progress_bar_config(disable=True)
    pipe = put_in_layout(
        pipeline,
        height=call["height"],
        width=call["width"],
        num_inference_steps=STEPS,
        max_sequence_length=call.get("max_sequence_length", 256),
        output_type="latent",
        warmup_steps=1,
        **flags,
    )
    return pipe, {**call, "num_inference_steps": STEPS}

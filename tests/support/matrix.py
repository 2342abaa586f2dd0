"""Cells of the matrix: tiny pipelines in xfuser's class, and the ways in which a backend runs."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_adapters.registry import adapters
from diffusers_adapters.tiny import TINY_MODELS
from support.xdit_runs import wrap
from xfuser_fastcache.benchmarks.layouts import LAYOUTS
from xfuser_fastcache.chaos.families import SIZES
from xfuser_fastcache.plugins import BUILT_IN, FORECASTERS, TOKEN_PLANS

STEPS = 8
# How a backend runs in a cell: `Fast` on the first version of a family in the first way and in
# another in turn, else in the first one. Slow cases in all they can.
VARIANTS: dict[str, dict[str, Any]] = {
    "stack": {},
    "three spans": {"granularity": 3},
    "budget": {"forecaster": "data", "computed_steps": 4},
    # What other packages add; our own have tests of their own.
    **{
        name: {"forecaster": name}
        for name in FORECASTERS
        if name not in BUILT_IN[FORECASTERS.group]
    },
    **{
        name: {"token_plan": name}
        for name in TOKEN_PLANS
        if name not in BUILT_IN[TOKEN_PLANS.group]
    },
}
FORECASTS_ALL = ("Fast", "TaylorSeer")

# Layouts beside one rank in which CI runs a tiny pipeline, with `Fast` alone. Those that are not
# named run in all of them, with other backends in turn.
IN_CI: dict[str, tuple[str, ...]] = {
    "cogvideox": ("cfg 2",),
    "consisid": ("ulysses 2",),
    "flux-control": (),
    "flux-fill": ("ring 2",),
    "flux-kontext": ("ulysses 2",),
    "flux2": ("pipefusion 2",),
    "flux2-edit": (),
    "hunyuan-dit": (),
    "hunyuan-video": ("ulysses 2",),
    "hunyuan-video15": ("ring 2",),
    "klein": (),
    "krea2": ("ulysses 2",),
    "krea2-turbo": (),
    "ideogram4": (),
    "latte": (),
    "ltx2": (),
    "lumina2": (),
    "pixart-sigma": ("cfg 2",),
    "qwen": ("ulysses 2",),
    "qwen-edit": ("cfg 2",),
    "qwen-edit-2511": (),
    "sana": (),
    "sd3.5": ("ulysses 2", "pipefusion 2"),
    "wan-i2v": ("cfg 2",),
    "wan-ti2v": ("ulysses 2",),
    "wan-vace": ("ulysses 2",),
    "wan22": ("ring 2",),
    "wan22-i2v": (),
    "z-image": ("ulysses 2",),
    "z-image-turbo": (),
}


def is_first_of_family(model: str) -> bool:
    """Whether no other tiny pipeline of the model's adapter comes before it."""
    adapter = TINY_MODELS[model].adapter
    return next(name for name, tiny in TINY_MODELS.items() if tiny.adapter == adapter) == model


def variants(model: str, backend: str, slow: bool, turn: int) -> dict[str, dict[str, Any]]:
    """Return the ways in which a backend runs in a cell.

    Args:
        model: a tiny pipeline.
        backend: that runs.
        slow: whether the case is.
        turn: of the layout.
    """
    if not slow and not (backend == "Fast" and is_first_of_family(model)):
        return {"stack": {}}
    found = {k: v for k, v in VARIANTS.items() if "forecaster" not in v}
    found = VARIANTS if backend in FORECASTS_ALL else found
    if adapters()[TINY_MODELS[model].adapter].long_skips:
        refused = ("three spans", "budget" if "pipefusion" in list(LAYOUTS)[turn] else "")
        found = {k: v for k, v in found.items() if k not in refused}
    if slow:
        return found
    others = [name for name in found if name != "stack"] or ["stack"]
    other = others[(turn + list(TINY_MODELS).index(model)) % len(others)]
    return {name: found[name] for name in ("stack", other)}


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bitwise equality; two ranks without output agree."""
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def build(model: str, batch: int, **flags: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model's pipeline in xfuser's class, and the arguments of one call."""
    pipeline, call = TINY_MODELS[model].make(batch=batch, **SIZES.get(model, {}))
    call["num_inference_steps"] = STEPS
    pipe, _ = wrap(pipeline, call, warmup_steps=1, **flags)
    return pipe, call

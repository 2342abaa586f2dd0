"""Cells of the matrix: tiny pipelines in xfuser's class, and the ways in which a backend runs."""

from __future__ import annotations

from typing import Any

import torch

from support.tiny import TINY_MODELS
from support.xdit_runs import wrap
from xfuser_fastcache.plugins import BUILT_IN, FORECASTERS, TOKEN_PLANS

STEPS = 10
# How a backend runs in a cell: `Fast` in all ways on the first version of a family, else in the
# first one; slow cases in all that they can.
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


def is_first_of_family(model: str) -> bool:
    """Whether no other tiny pipeline of the model's adapter comes before it."""
    adapter = TINY_MODELS[model].adapter
    return next(name for name, tiny in TINY_MODELS.items() if tiny.adapter == adapter) == model


def variants(model: str, backend: str, slow: bool) -> dict[str, dict[str, Any]]:
    """Return the ways in which a backend runs in a cell."""
    if slow or (backend == "Fast" and is_first_of_family(model)):
        found = {k: v for k, v in VARIANTS.items() if "forecaster" not in v}
        return VARIANTS if backend in FORECASTS_ALL else found
    return {"stack": {}}


# Eight blocks: a stage of PipeFusion 4 must not be empty.
SIZES = {
    model: {"num_layers": 4, "num_single_layers": 4}
    for model, tiny in TINY_MODELS.items()
    if tiny.adapter == "flux"
}


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bitwise equality; two ranks without output agree."""
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def build(model: str, batch: int, **flags: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model's pipeline in xfuser's class, and the arguments of one call."""
    pipeline, call = TINY_MODELS[model].make(batch=batch, **SIZES.get(model, {}))
    call["num_inference_steps"] = STEPS
    pipe, _ = wrap(pipeline, call, warmup_steps=1, **flags)
    return pipe, call

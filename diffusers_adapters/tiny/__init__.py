"""Tiny pipelines with random weights, in diffusers' own classes, for fault worlds and tests.

A family a file, beside its adapter; each has `MODELS`, by name. A function in it returns a
diffusers pipeline without text encoders, and the keyword arguments of one call: embeddings, size,
steps and ``output_type="latent"``. The same seed gives the same weights and embeddings on every
rank.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from diffusers_adapters.tiny.model import TinyModel

_FAMILIES = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "model")
TINY_MODELS: dict[str, TinyModel] = {
    name: model
    for family in _FAMILIES
    for name, model in import_module(f"{__name__}.{family}").MODELS.items()
}
TINY_PIPELINES = {name: model.make for name, model in TINY_MODELS.items()}

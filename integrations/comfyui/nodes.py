"""The nodes: a cache on a MODEL, and what it decided."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from xfuser_fastcache import CacheConfig, save_heat_map
from xfuser_fastcache.config.budget import QUALITIES
from xfuser_fastcache.plugins import GATES
from xfuser_fastcache.reports.views import decision_rows

from .adapters import FAMILIES
from .sampling import CachedSampling, Report

KEY = "xfuser_fastcache"
BUDGETS = ("computed_steps", "quality", "threshold")
DECISIONS = "FASTCACHE"


class FastCache:
    """Puts a step cache on a copy of a MODEL; the one that is given stays as it is."""

    CATEGORY = "advanced/model"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL", DECISIONS)
    RETURN_NAMES = ("model", "decisions")
    DESCRIPTION = "Skips denoising steps of a diffusion transformer, and forecasts what is skipped."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Say what the node takes."""
        return {
            "required": {
                "model": ("MODEL",),
                "budget": (list(BUDGETS), {"tooltip": "which of the next three counts"}),
                "computed_steps": (
                    "INT",
                    {"default": 10, "min": 1, "max": 1000, "tooltip": "steps that are computed"},
                ),
                "quality": (list(QUALITIES), {"default": "medium"}),
                "threshold": (
                    "FLOAT",
                    {
                        "default": 0.1,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.01,
                        "tooltip": "change below which a step is skipped; 0 never skips",
                    },
                ),
                "backend": (list(GATES), {"default": "Fast"}),
            },
            "optional": {
                "calibration": (
                    "STRING",
                    {"default": "", "tooltip": "file of fastcache calibrate, for a budget"},
                ),
            },
        }

    def patch(
        self,
        model: Any,
        budget: str,
        computed_steps: int,
        quality: str,
        threshold: float,
        backend: str,
        calibration: str = "",
    ) -> tuple[Any, CachedSampling]:
        """Return a copy of the model whose samplings are cached.

        Args:
            model: a `ModelPatcher`.
            budget: one of `BUDGETS`, which of the next three counts.
            computed_steps: of a sampling.
            quality: one of `QUALITIES`.
            threshold: relative change below which a step is skipped, as the backend measures it.
            backend: name of a gate.
            calibration: path of a file of `fastcache calibrate`; empty for none.

        Raises:
            ValueError: a model that is not of `FAMILIES`, or options that do not go together.
        """
        from comfy.patcher_extension import WrappersMP

        refuse_others(model.model.diffusion_model)
        asked = {"computed_steps": computed_steps, "quality": quality, "threshold": threshold}
        option = "cache_ratio_threshold" if budget == "threshold" else budget
        options = {"use_cache": backend, option: asked[budget], "calibration": calibration or None}
        sampling = CachedSampling(CacheConfig.from_dict(options))
        patched = model.clone()
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, sampling.sample)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, sampling.predict)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, sampling.apply_model)
        return patched, sampling


class FastCacheReport:
    """Shows what the cache decided in the sampling that a latent comes from."""

    CATEGORY = "advanced/model"
    FUNCTION = "show"
    RETURN_TYPES = ("LATENT", "IMAGE", "STRING")
    RETURN_NAMES = ("latent", "heat_map", "text")
    DESCRIPTION = "A heat map of computed and skipped steps; the latent is handed on."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Say what the node takes; the latent makes it run behind the sampler."""
        return {"required": {"decisions": (DECISIONS,), "latent": ("LATENT",)}}

    def show(self, decisions: CachedSampling, latent: Any) -> tuple[Any, torch.Tensor, str]:
        """Return the latent, the heat map `(1, height, width, 3)` in [0, 1], and the text.

        Raises:
            ValueError: nothing was sampled with that cache.
        """
        if decisions.report is None:
            raise ValueError(
                "nothing was sampled with this cache yet: connect the sampler's model to Fast "
                "cache, and its latent to this node"
            )
        return latent, heat_map(decisions.report), text_of(decisions.report)


def refuse_others(model: Any) -> None:
    """Refuse a model that no adapter of this pack is for.

    Raises:
        ValueError: it names those that there are.
    """
    if not any(family.supports(model) for family in FAMILIES.values()):
        known = ", ".join(f"{f.folder}*.{f.model_class}" for f in FAMILIES.values())
        raise ValueError(
            f"Fast cache has no adapter for {type(model).__module__}.{type(model).__name__}; it "
            f"has them for {known}. Bypass the node, or add one: docs/extending.md."
        )


def heat_map(report: Report) -> torch.Tensor:
    """Return the heat map of a sampling as an IMAGE, `(1, height, width, 3)`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heat_map.png"
        save_heat_map(report.trace, list(report.statistics["blocks"]), path)
        with Image.open(path) as drawn:
            pixels = np.asarray(drawn.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]


def text_of(report: Report) -> str:
    """Return the decisions of a sampling in words, a line a branch and span."""
    rows = decision_rows(report.trace)
    lines = [
        f"branch {row['branch']}, {row['first_block']} to {row['last_block']}: {row['steps']}"
        for row in rows
    ]
    skipped = report.statistics["block_approx_ratio"]
    return "\n".join([f"{skipped:.1%} of blocks skipped (- skipped, others computed)", *lines])

"""The toy FLUX in xfuser's class: one short generation, always from the same noise."""

from __future__ import annotations

from typing import Any

import torch

from support.worlds import ROOT
from xfuser_fastcache.xdit import cpu_platform

STEPS = 9
PROMPTS = ["a large red ring, top left, on dark blue", "a small green square, center, on black"]
THRESHOLD = 0.8
MASK = [1, 1, 0, 1, 0, 0, 1, 0, 1]


def load(**flags: Any) -> Any:
    """Return the toy FLUX in xfuser's class, in the layout that xDiT's flags ask for."""
    from diffusers import FluxPipeline
    from xfuser import xFuserArgs
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    config, _ = xFuserArgs(
        height=128, width=128, num_inference_steps=STEPS, max_sequence_length=32, **flags
    ).create_config()
    pipeline = FluxPipeline.from_pretrained(ROOT / "toys" / "flux", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    cpu_platform.prepare_engine_config(config, pipeline)
    return xFuserPipelineWrapperRegister.get_class(pipeline)(pipeline, config)


def generate(pipe: Any, **changes: Any) -> torch.Tensor | None:
    """Run one generation from the same noise; None on a rank that holds no output."""
    arguments = {
        "prompt": PROMPTS[0],
        "height": 128,
        "width": 128,
        "num_inference_steps": STEPS,
        "max_sequence_length": 32,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **changes,
    }
    output = pipe(**arguments)
    return None if output is None else output.images


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bitwise equality; two ranks without output agree."""
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def psnr(a: torch.Tensor | None, b: torch.Tensor | None) -> float | None:
    """Peak signal-to-noise ratio of latents in dB, against the range of `b`."""
    if a is None or b is None or torch.equal(a, b):
        return None
    span = b.max() - b.min()
    return (10 * torch.log10(span**2 / (a - b).square().mean())).item()

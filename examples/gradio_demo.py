"""A page to try the cache on: a caption, a budget, and both pictures side by side.

    pip install gradio
    python examples/gradio_demo.py            # then open http://127.0.0.1:7860
    python examples/gradio_demo.py --models FOLDER_OR_HUB_NAME ... --device cuda

The embedded toys are the default; they need neither a download nor a GPU.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import xfuser_fastcache as fc
from xfuser_fastcache.plugins import GATES
from xfuser_fastcache.xdit.loaded import call_arguments

TOYS = Path(__file__).resolve().parent.parent / "toys"
CAPTION = "a large red ring, top left, on dark blue"


@functools.lru_cache(maxsize=2)
def pipeline(model: str, device: str) -> Any:
    """Return a pipeline, loaded once."""
    pipe = DiffusionPipeline.from_pretrained(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    model: str, device: str, prompt: str, backend: str, steps: int, budget: int, seed: int
) -> tuple[Image.Image, Image.Image, Image.Image, Image.Image, str]:
    """Draw uncached and cached.

    Args:
        model: a folder or a name on the hub.
        device: such as "cpu".
        prompt: what is drawn.
        backend: of the cache.
        steps: of the generation.
        budget: steps that are computed; 0 leaves it to the backend's gate.
        seed: of the noise.

    Returns:
        Uncached, cached, ten times their difference, the heat map of decisions, and what was saved.
    """
    pipe = pipeline(model, device)
    call = {**call_arguments(model), "num_inference_steps": int(steps), "prompt": prompt}

    def once() -> tuple[Image.Image, float]:
        began = time.perf_counter()
        noise = torch.Generator("cpu").manual_seed(int(seed))
        return pipe(**call, generator=noise).images[0], time.perf_counter() - began

    before, full_s = once()
    asked = {"computed_steps": min(int(budget), int(steps))} if budget else {}
    fc.apply_cache_on_pipeline(pipe, use_cache=backend, **asked)
    try:
        after, cached_s = once()
        (found,) = fc.summary(pipe, logging=False)
        trace = fc.get_cache_trace(pipe.transformer)
    finally:
        fc.remove_cache_from_pipeline(pipe)
    apart = np.abs(np.asarray(before, dtype=np.int16) - np.asarray(after, dtype=np.int16))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heat_map.png"
        fc.save_heat_map(trace, list(found.statistics["blocks"]), path)
        with Image.open(path) as opened:
            heat_map = opened.copy()
    skipped = found.statistics["block_approx_ratio"]
    said = f"{full_s:.2f} s uncached, {cached_s:.2f} s cached; {skipped:.0%} of blocks skipped"
    return (
        before,
        after,
        Image.fromarray((10 * apart).clip(0, 255).astype(np.uint8)),
        heat_map,
        said,
    )


def page(models: list[str], device: str) -> Any:
    """Return the page."""
    import gradio as gr

    with gr.Blocks(title="xfuser-fastcache") as blocks:
        with gr.Row():
            model = gr.Dropdown(models, value=models[0], label="model")
            backend = gr.Dropdown(list(GATES), value="Fast", label="backend")
            steps = gr.Slider(2, 50, 28, step=1, label="steps")
            budget = gr.Slider(0, 50, 10, step=1, label="computed steps (0: the gate decides)")
            seed = gr.Number(0, precision=0, label="seed")
        prompt = gr.Textbox(CAPTION, label="prompt")
        button = gr.Button("Draw")
        with gr.Row():
            shown = [gr.Image(label=name) for name in ("uncached", "cached", "10 x difference")]
        heat_map, said = gr.Image(label="decisions"), gr.Textbox(label="time")
        button.click(
            lambda model, *given: draw(model, device, *given),
            [model, prompt, backend, steps, budget, seed],
            [*shown, heat_map, said],
            concurrency_limit=1,  # a cache serves one generation at a time
        )
    return blocks


def main() -> None:
    """Serve the page."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--models", nargs="+", default=[str(TOYS / n) for n in ("flux", "sd3")])
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--port", type=int, default=7860)
    given = flags.parse_args()
    page(given.models, given.device).launch(server_name="127.0.0.1", server_port=given.port)


if __name__ == "__main__":
    main()

"""`xdit-fastcache` on FLUX.2 and FLUX.1-Kontext, where the names of xDiT's registry point."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FluxKontextPipeline, FluxPipeline
from PIL import Image
from support.worlds import ROOT, launch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from diffusers_adapters.tiny.flux2 import tiny_flux2, tiny_klein
from diffusers_adapters.tiny.model import picture

STEPS, TEXT = 10, 16
CALL = (
    "--prompt", "ring", "--height", "128", "--width", "128", "--max_sequence_length", str(TEXT),
    "--num_inference_steps", str(STEPS), "--seed", "1",
)  # fmt: skip
CACHED = ("--cache_method", "fastcache", "--cache_config", '{"cache_ratio_threshold":12.0}')
MODELS: dict[str, Any] = {"FLUX.2-dev": tiny_flux2, "FLUX.2-klein-4B": tiny_klein}
# Of the prompt of both: dev's has its text one level deeper.
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{{ m['content'][0]['text'] }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines with all they are saved with; three layers of text are one embedding."""
    folder = tmp_path_factory.mktemp("hub")
    toy = ROOT / "toys" / "flux"
    tokenizer = AutoTokenizer.from_pretrained(toy / "tokenizer_2")
    tokenizer.chat_template = TEMPLATE
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=30,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    for name, make in MODELS.items():
        pipe, _ = make(text_dim=3 * 16)
        pipe.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
        pipe.save_pretrained(folder / "black-forest-labs" / name)
    drawing = FluxPipeline.from_pretrained(toy)
    kontext = FluxKontextPipeline(**drawing.components)
    kontext.save_pretrained(folder / "black-forest-labs" / "FLUX.1-Kontext-dev")
    picture(64).save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank of the runner in the folder that its first argument names.

    Kontext resizes what it edits to a megapixel, which takes too long here.
    """
    script = tmp_path_factory.mktemp("script") / "runner.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            os.chdir(sys.argv.pop(1))
            from diffusers.pipelines.flux import pipeline_flux_kontext
            pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(128, 128)]
            from xfuser_fastcache.xdit import runner
            runner.run()
            """
        )
    )
    return script


def draw(
    runner: Path, hub: Path, directory: Path, ranks: int, *flags: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Run it; return the picture, and the cache's statistics where there is one."""
    launch(runner, ranks, str(hub), *CALL, *flags, "--output_directory", str(directory))
    drawn = next(directory.glob("*.png"))
    with Image.open(drawn) as image:
        found = np.asarray(image.convert("RGB")).astype(int)
    statistics = directory / "cache_statistics.json"
    return found, json.loads(statistics.read_text()) if statistics.exists() else {}


SLOW = pytest.mark.slow
PIPEFUSION = "--pipefusion_parallel_degree 2"
EDIT = "--input_images image.png"


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("FLUX.2-klein-4B", PIPEFUSION),
        pytest.param("FLUX.2-dev", PIPEFUSION, marks=SLOW),
        pytest.param("FLUX.2-dev", f"--ulysses_degree 2 {EDIT}", marks=SLOW),
        pytest.param("black-forest-labs/FLUX.2-klein-4B", f"--ring_degree 2 {EDIT}", marks=SLOW),
        pytest.param("FLUX.2-dev", "--data_parallel_degree 2", marks=SLOW),
        pytest.param("FLUX.1-Kontext-dev", f"--ulysses_degree 2 {EDIT}", marks=SLOW),
        pytest.param("FLUX.1-Kontext-dev", f"--ring_degree 2 {EDIT}", marks=SLOW),
    ],
)
def test_the_runner_draws_cached(
    runner: Path, hub: Path, tmp_path: Path, model: str, flags: str
) -> None:
    prompts = ("--prompt", "red", "blue") if "data" in flags else ()
    given = ("--model", model, *flags.split(), *prompts, *CACHED)
    found, statistics = draw(runner, hub, tmp_path, 2, *given)
    assert found.shape == (128, 128, 3)
    assert (statistics["use_cache"], statistics["steps"]) == ("Fast", STEPS)
    # Of a pipeline, the first stages do not call the scheduler.
    clock = "plan" if "pipefusion" in flags else "scheduler"
    assert (statistics["collectives_per_step"], statistics["clock"]) == (1, clock)
    assert 0 < statistics["block_approx_ratio"] < 1

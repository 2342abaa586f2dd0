"""The shipped toy FLUX: loads offline, is small, takes any prompt and draws what captions say."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from toys.captions import sample_captions
from toys.checker import check_caption

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "toys" / "flux"
CALL = {"height": 128, "width": 128, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def pipe():
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_folder_fits_in_8_mb():
    total = sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file())
    assert total <= 8_000_000


def test_record_is_beside_the_weights():
    for name in ("record.json", "losses.json", "losses.png", "samples.png"):
        assert (FOLDER / "training" / name).is_file()


def test_loads_offline_with_default_dtype():
    """A fresh process with the hub switched off; all parts agree on float32 without being told."""
    code = (
        "import sys, torch; from diffusers import FluxPipeline;"
        "pipe = FluxPipeline.from_pretrained(sys.argv[1]);"
        "parts = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)];"
        "assert {p.dtype for m in parts for p in m.parameters()} == {torch.float32};"
        "image = pipe('a small red ring, left, on black', height=128, width=128,"
        " num_inference_steps=1, max_sequence_length=32).images[0];"
        "assert image.size == (128, 128)"
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(FOLDER)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_tokenizers_take_any_prompt_and_survive_saving(pipe, tmp_path):
    from transformers import AutoTokenizer

    text = "A LARGE red ring, top left; an oil painting of Ada's cat?"
    ids = pipe.tokenizer(text).input_ids
    assert ids == pipe.tokenizer_2(text).input_ids
    assert ids[-1] == pipe.tokenizer.eos_token_id
    assert pipe.tokenizer.unk_token_id in ids
    assert "large red ring" in pipe.tokenizer.decode(ids)
    assert pipe.tokenizer.model_max_length == 32
    pipe.tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)(text).input_ids == ids


def test_any_english_prompt_gives_a_picture(pipe):
    prompts = ["", "A photograph of an astronaut riding a horse, 35mm, very detailed! " * 5]
    images = pipe(prompt=prompts, num_inference_steps=2, output_type="np", **CALL).images
    assert images.shape == (2, 128, 128, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.01


def test_the_seed_matters_and_repeats(pipe):
    def picture(seed):
        generator = torch.Generator().manual_seed(seed)
        prompt = "a large blue square, center, on white"
        return pipe(
            prompt, num_inference_steps=3, generator=generator, output_type="np", **CALL
        ).images

    assert np.array_equal(picture(0), picture(0))
    assert not np.array_equal(picture(0), picture(1))


def test_unseen_captions_are_drawn(pipe):
    captions = sample_captions(24, seed=11, split="unseen")
    generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
    images = pipe(prompt=captions, num_inference_steps=14, generator=generators, **CALL).images
    passed = [check_caption(i, c).passed for i, c in zip(images, captions, strict=True)]
    assert np.mean(passed) >= 0.8, [c for c, p in zip(captions, passed, strict=True) if not p]

"""The shipped toys: load offline, are small, take any prompt and draw what captions say."""

import json

import numpy as np
import pytest
import torch
from support.worlds import ROOT, python

from diffusers_adapters.registry import adapters
from xfuser_fastcache.benchmarks.quality import drawn_by_toys
from xfuser_fastcache.calibration.prompts import AUDIT, prompts_for
from xfuser_fastcache.reports.clips import drawn_by

TOYS = ROOT / "toys"


@pytest.fixture(
    params=sorted(model for model in adapters() if (ROOT / "toys" / model).exists()),
    scope="module",
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(TOYS / name, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def call(name):
    """Arguments of a call besides prompt and steps; as training marks the toy."""
    from toys.training.families import FAMILIES

    return FAMILIES[name]().call_kwargs


def size_of(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_all_toys_fit_in_32_mb_and_each_in_8(name):
    assert size_of(TOYS / name) <= 8_000_000
    assert size_of(TOYS) <= 32_000_000


def test_record_is_beside_the_weights(name):
    for file in ("record.json", "losses.json", "losses.png", "samples.png"):
        assert (TOYS / name / "training" / file).is_file()


def test_loads_offline_with_default_dtype(name):
    """A fresh process with the hub switched off; all parts agree on float32 without being told."""
    code = (
        "import sys, torch; from diffusers import DiffusionPipeline;"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1]);"
        "parts = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)];"
        "assert {p.dtype for m in parts for p in m.parameters()} == {torch.float32}"
    )
    done = python("-c", code, TOYS / name, environment={"TRANSFORMERS_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def test_tokenizers_take_any_prompt_and_survive_saving(pipe, tmp_path):
    from transformers import AutoTokenizer

    text = "A LARGE red ring, top left; an oil painting of Ada's cat?"
    tokenizers = [part for key, part in pipe.components.items() if key.startswith("tokenizer")]
    ids = tokenizers[0](text).input_ids
    assert all(tokenizer(text).input_ids == ids for tokenizer in tokenizers)
    assert ids[-1] == pipe.tokenizer.eos_token_id
    assert pipe.tokenizer.unk_token_id in ids
    assert "large red ring" in pipe.tokenizer.decode(ids)
    assert pipe.tokenizer.model_max_length == 32
    pipe.tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)(text).input_ids == ids


def drawn(pipe, call, prompts, **arguments):
    """What prompts draw: pictures `(height, width, 3)`, or clips with their frames before that."""
    return drawn_by(pipe(prompt=prompts, output_type="np", **{**call, **arguments}))


def test_any_english_prompt_gives_a_picture(pipe, call):
    prompts = ["", "A photograph of an astronaut riding a horse, 35mm, very detailed! " * 5]
    items = np.stack(drawn(pipe, call, prompts, num_inference_steps=2))
    frames = (call["num_frames"],) if "num_frames" in call else ()
    assert items.shape == (2, *frames, call["height"], call["width"], 3)
    assert np.isfinite(items).all()
    assert items.std() > 0.01


def test_the_seed_matters_and_repeats(pipe, call):
    def picture(seed):
        generator = torch.Generator().manual_seed(seed)
        prompt = "a large blue square, center, on white"
        return drawn(pipe, call, prompt, num_inference_steps=3, generator=generator)

    assert np.array_equal(picture(0), picture(0))
    assert not np.array_equal(picture(0), picture(1))


@pytest.mark.parametrize(
    "name",
    [
        n if n == "flux" else pytest.param(n, marks=pytest.mark.slow)
        for n in sorted(adapters())
        if (TOYS / n).exists()
    ],
    indirect=True,
)
def test_unseen_captions_are_drawn_as_well_as_the_record_says(name, pipe, call):
    """Other captions and half the steps than those of the record; 12 of them stand for 128."""
    record = json.loads((TOYS / name / "training" / "record.json").read_text())["evaluation"]
    captions = prompts_for(str(TOYS / name), AUDIT, 12, seed=11)
    generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
    items = drawn(pipe, call, captions, num_inference_steps=14, generator=generators)
    toys = drawn_by_toys(captions)
    results = [toys.check(x, c) for x, c in zip(items, toys.captions, strict=True)]
    assert np.mean([r.passed for r in results]) >= record["accuracy"] - 0.2
    for attribute in {"colour", "place", "background"} & set(vars(results[0])):
        assert np.mean([getattr(r, attribute) for r in results]) >= 0.9, attribute

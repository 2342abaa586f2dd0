"""Qwen-Image and its Edit in plain diffusers: what is measured, and what changes nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.counted import counted_tokens
from support.families import made

from diffusers_adapters.qwen_image import QwenImageAdapter
from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import get_cache_statistics, get_cache_trace
from xfuser_fastcache.apply import apply_cache_on_pipeline, remove_cache_from_pipeline
from xfuser_fastcache.models.token_layout import TokenCounts

pytestmark = pytest.mark.usefixtures("without_gradients")
STEPS, NOISE, CONDITION = 6, 16, 8  # tokens
MODELS = ("qwen", "qwen-edit", "qwen-edit-2511")
WAYS: dict[str, dict[str, Any]] = {
    "stack": {},
    "spans": {"granularity": 2, "forecaster": "linear"},
    "output": {"forecaster": "output"},
    "data": {"forecaster": "data"},
    "split": {"motion_threshold": 0.3},
    "split, dropped": {"motion_threshold": 0.3, "static_kv": "drop"},
    "merge": {"enable_token_merge": True},
}
# The last one has all that the others have; the rest of its ways would tell nothing more of them.
CASES = [(model, "stack") for model in MODELS[:2]] + [(MODELS[2], way) for way in WAYS]


@pytest.mark.parametrize(("model", "way"), CASES)
def test_only_noise_is_measured_and_nothing_changes_at_threshold_0(model: str, way: str) -> None:
    pipe, generate = made(model, STEPS)
    control = generate()
    narrows = "motion_threshold" in WAYS[way] or "enable_token_merge" in WAYS[way]
    for threshold in (0.0, 12.0):
        apply_cache_on_pipeline(pipe, cache_ratio_threshold=threshold, **WAYS[way])
        with counted_tokens() as seen:
            found = generate()
        statistics = get_cache_statistics(pipe.transformer)
        branches = {row["branch"] for row in get_cache_trace(pipe.transformer)}
        if threshold:
            # Another size, and another text, which the branch after it has too.
            text = {"prompt_embeds": torch.randn(1, 5, 16), "prompt_embeds_mask": torch.ones(1, 5)}
            assert generate(height=96, **text).isfinite().all()
            assert torch.equal(generate(), found)
        remove_cache_from_pipeline(pipe)
        assert torch.equal(found, control) == (threshold == 0 and not narrows)
        assert found.isfinite().all()
        assert (seen, branches) == ({NOISE}, {0, 1})
        assert (statistics["clock"], statistics["recomputed"]) == ("scheduler", 0)
        assert (statistics["block_approx_ratio"] > 0) == (threshold > 0)
        if not threshold:
            assert (statistics["spatial_approx_ratio"] > 0) == narrows
    assert torch.equal(generate(), control)


@pytest.mark.parametrize("model", MODELS)
def test_the_modulated_input_is_what_attention_is_given(model: str) -> None:
    """With a timestep of their own for a condition's tokens, too."""
    pipe, generate = made(model, STEPS)
    block, pairs = pipe.transformer.transformer_blocks[0], []
    given: list[torch.Tensor] = []
    block.attn.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["hidden_states"]), with_kwargs=True
    )
    block.register_forward_hook(
        lambda module, args, kwargs, output: pairs.append(
            (QwenImageAdapter.modulated_input(block, args, kwargs), given.pop())
        ),
        with_kwargs=True,
    )
    generate()
    assert len(pairs) == 2 * STEPS
    assert all(torch.equal(found, attended) for found, attended in pairs)
    rows = NOISE if model == "qwen" else NOISE + CONDITION
    assert pairs[0][0].shape == (1, rows, 32)


@pytest.mark.parametrize(
    ("shapes", "layered", "image"),
    [
        ([(1, 4, 4)], False, None),
        ([(1, 4, 4), (1, 2, 4)], False, range(16)),
        ([(1, 4, 4), (1, 2, 4), (1, 2, 2)], False, range(16)),
        ([(1, 4, 4), (1, 4, 4), (1, 2, 4)], True, range(32)),
        (None, False, None),
    ],
    ids=["text to image", "edit", "two pictures", "layers", "no shapes"],
)
def test_what_a_condition_holds_is_never_measured(
    shapes: Any, layered: bool, image: range | None
) -> None:
    model = SimpleNamespace(config={"use_layer3d_rope": layered})
    counts = TokenCounts(lambda args, kwargs: QwenImageAdapter.image_tokens(model, args, kwargs))
    block = TINY_PIPELINES["qwen"]()[0].transformer.transformer_blocks[0]
    contract = QwenImageAdapter.block_lists["transformer_blocks"].of(block, counts)
    given = torch.randn(2, 44, 4)
    arguments = {"hidden_states": given, "img_shapes": shapes and [shapes] * 2}
    counts.open((), arguments)
    assert counts.image == image
    noise = given[:, : 44 if image is None else image.stop].clone()
    given[:, noise.shape[1] :] = float("nan")
    assert torch.equal(contract.image_of(given), noise)


def test_a_mask_of_text_and_image_is_narrowed_with_the_tokens() -> None:
    """As diffusers 0.37 and xfuser hand it to each block, beside other things."""
    contract = QwenImageAdapter.block_lists["transformer_blocks"]
    (table,) = (t for t in contract.tables if t.name == "joint_attention_kwargs")
    given = {"attention_mask": torch.arange(9)[None], "scale": 0.5}
    found = table.narrowed(given, tokens=6, behind=2, rows=torch.tensor([1, 4]))
    assert found["attention_mask"].tolist() == [[0, 2, 5, 7, 8]] and found["scale"] == 0.5

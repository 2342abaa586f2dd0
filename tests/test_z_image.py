"""Z-Image in plain diffusers: lists of latents, image and text in one tensor, both padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.counted import counted_tokens
from support.families import made

from diffusers_adapters.tiny import TINY_PIPELINES
from diffusers_adapters.z_image import ZImageAdapter
from xfuser_fastcache import get_cache_statistics
from xfuser_fastcache.apply import apply_cache_on_pipeline, remove_cache_from_pipeline
from xfuser_fastcache.models.token_layout import TokenCounts

pytestmark = pytest.mark.usefixtures("without_gradients")
STEPS, NOISE = 6, 16  # tokens, which are padded to 32, as the text is
WAYS: dict[str, dict[str, Any]] = {
    "stack": {},
    "spans": {"granularity": 2, "forecaster": "linear"},
    "output": {"forecaster": "output"},
    "data": {"forecaster": "data"},
    "split": {"motion_threshold": 0.3},
    "split, dropped": {"motion_threshold": 0.3, "static_kv": "drop"},
    "merge": {"enable_token_merge": True},
}
CASES = [("z-image", way) for way in WAYS] + [("z-image-turbo", "stack")]
LONG = {"prompt_embeds": [torch.linspace(-1, 1, 40 * 16).reshape(40, 16)]}  # padded to 64


@pytest.mark.parametrize(("model", "way"), CASES)
def test_only_the_image_is_measured_and_nothing_changes_at_threshold_0(
    model: str, way: str
) -> None:
    """Neither text nor padding; a longer prompt than the negative one is masked in the batch."""
    pipe, generate = made(model, STEPS)
    control, long = generate(), generate(**LONG)
    narrows = "motion_threshold" in WAYS[way] or "enable_token_merge" in WAYS[way]
    of_latents = way in ("output", "data")
    wanted = NOISE * (1 if "turbo" in model else 2) * (4 if of_latents else 1)
    for threshold in (0.0, 12.0):
        apply_cache_on_pipeline(pipe, cache_ratio_threshold=threshold, **WAYS[way])
        with counted_tokens() as seen:
            found, of_long = generate(), generate(**LONG)
        statistics = get_cache_statistics(pipe.transformer)
        if threshold:
            assert generate(height=96).isfinite().all()  # 24 tokens
            assert torch.equal(generate(), found)
        remove_cache_from_pipeline(pipe)
        exact = threshold == 0 and not narrows
        assert torch.equal(found, control) == torch.equal(of_long, long) == exact
        assert found.isfinite().all() and of_long.isfinite().all()
        assert seen == {wanted}
        assert (statistics["clock"], statistics["recomputed"]) == ("scheduler", 0)
        assert (statistics["block_approx_ratio"] > 0) == (threshold > 0)
        if not threshold:
            assert (statistics["spatial_approx_ratio"] > 0) == narrows
    assert torch.equal(generate(), control)


def test_the_modulated_input_is_what_attention_is_given() -> None:
    pipe, generate = made("z-image", STEPS)
    layer, pairs = pipe.transformer.layers[0], []
    given: list[torch.Tensor] = []
    layer.attention.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    layer.register_forward_hook(
        lambda module, args, kwargs, output: pairs.append(
            (ZImageAdapter.modulated_input(layer, args, kwargs), given.pop())
        ),
        with_kwargs=True,
    )
    generate()
    assert len(pairs) == STEPS and pairs[0][0].shape == (2, 32 + 32, 32)
    assert all(torch.equal(found, attended) for found, attended in pairs)


@pytest.mark.parametrize(("ranks", "held"), [(1, [16]), (2, [16, 0]), (4, [16, 0, 0, 0])])
def test_padding_and_text_are_never_measured(ranks: int, held: list[int]) -> None:
    """Whatever they hold, and whichever rank holds them."""
    latents = [torch.zeros(4, 1, 8, 8)] * 2
    layer = TINY_PIPELINES["z-image"]()[0].transformer.layers[0]
    given = torch.randn(2, 64, 32)
    noise = given[:, :NOISE].clone()
    given[:, NOISE:] = float("nan")
    parts = []
    for rank in range(ranks):
        counts = TokenCounts(
            lambda args, kwargs: ZImageAdapter.image_tokens(None, args, kwargs),
            shard=rank,
            shards=ranks,
        )
        contract = ZImageAdapter.block_lists["layers"].of(layer, counts)
        counts.open((latents, torch.zeros(2), None), {})
        shard = given.chunk(ranks, dim=1)[rank]
        streams = contract.read((shard,), {})
        parts.append(streams.hidden_states)
        assert torch.equal(contract.pack(streams).nan_to_num(7.0), shard.nan_to_num(7.0))
    assert [part.shape[1] for part in parts] == held
    assert torch.equal(torch.cat(parts, dim=1), noise)


def test_a_picture_among_pictures_is_refused() -> None:
    """Z-Image-Omni gives each item a list of pictures, the last of which is noise."""
    latents = [[torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)]]
    pipe, _ = made("z-image", STEPS)
    apply_cache_on_pipeline(pipe)
    with pytest.raises(TypeError, match="a list of 2 latents for each item.*remove_cache"):
        pipe.transformer(latents, torch.zeros(1), [[torch.zeros(8, 16)]])

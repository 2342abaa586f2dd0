"""Krea-2 in plain diffusers: text ahead of the image in one tensor, and masked; and its mend."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from support.counted import counted_tokens
from support.families import made

from diffusers_adapters.krea2 import Krea2Adapter
from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import get_cache_statistics
from xfuser_fastcache.apply import apply_cache_on_pipeline, remove_cache_from_pipeline
from xfuser_fastcache.models.token_layout import TokenCounts
from xfuser_fastcache.xdit.mends import krea2

pytestmark = pytest.mark.usefixtures("without_gradients")
STEPS, TEXT, NOISE = 6, 8, 16
WAYS: dict[str, dict[str, Any]] = {
    "stack": {},
    "spans": {"granularity": 2, "forecaster": "linear"},
    "output": {"forecaster": "output"},
    "split": {"motion_threshold": 0.3},
    "split, dropped": {"motion_threshold": 0.3, "static_kv": "drop"},
    "merge": {"enable_token_merge": True},
}
CASES = [("krea2", way) for way in WAYS] + [("krea2-turbo", "stack")]


@pytest.mark.parametrize(("model", "way"), CASES)
def test_only_the_image_is_measured_and_nothing_changes_at_threshold_0(
    model: str, way: str
) -> None:
    pipe, generate = made(model, STEPS)
    control = generate()
    narrows = "motion_threshold" in WAYS[way] or "enable_token_merge" in WAYS[way]
    for threshold in (0.0, 12.0):
        apply_cache_on_pipeline(pipe, cache_ratio_threshold=threshold, **WAYS[way])
        with counted_tokens() as seen:
            found = generate()
        statistics = get_cache_statistics(pipe.transformer)
        if threshold:
            assert generate(height=96).isfinite().all()  # 24 tokens
            assert torch.equal(generate(), found)
        remove_cache_from_pipeline(pipe)
        assert torch.equal(found, control) == (threshold == 0 and not narrows)
        assert found.isfinite().all()
        assert seen == {NOISE}
        assert (statistics["clock"], statistics["recomputed"]) == ("scheduler", 0)
        assert (statistics["block_approx_ratio"] > 0) == (threshold > 0)
        if not threshold:
            assert (statistics["spatial_approx_ratio"] > 0) == narrows
    assert torch.equal(generate(), control)


def test_the_modulated_input_is_what_attention_is_given() -> None:
    pipe, generate = made("krea2", STEPS)
    block, pairs = pipe.transformer.transformer_blocks[0], []
    given: list[torch.Tensor] = []
    block.attn.to_q.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    block.register_forward_hook(
        lambda module, args, kwargs, output: pairs.append(
            (Krea2Adapter.modulated_input(block, args, kwargs), given.pop())
        ),
        with_kwargs=True,
    )
    generate()
    assert len(pairs) == 2 * STEPS and pairs[0][0].shape == (1, TEXT + NOISE, 64)
    assert all(torch.equal(found, attended) for found, attended in pairs)


@pytest.mark.parametrize(
    ("ranks", "text", "held"),
    [(1, 8, [16]), (2, 8, [4, 12]), (4, 8, [0, 4, 6, 6]), (2, 21, [0, 16]), (4, 9, [0, 5, 7, 4])],
)
def test_text_and_padding_are_never_measured(ranks: int, text: int, held: list[int]) -> None:
    """Whatever they hold, and whichever rank holds them: xDiT pads and cuts both as one."""
    block = TINY_PIPELINES["krea2"]()[0].transformer.transformer_blocks[0]
    padded = -(-(text + NOISE) // ranks) * ranks
    given = torch.full((1, padded, 64), float("nan"))
    noise = torch.randn(1, NOISE, 64)
    given[:, text : text + NOISE] = noise
    parts = []
    for rank in range(ranks):
        counts = TokenCounts(
            lambda args, kwargs: Krea2Adapter.image_tokens(None, args, kwargs),
            shard=rank,
            shards=ranks,
        )
        contract = Krea2Adapter.block_lists["transformer_blocks"].of(block, counts)
        counts.open((torch.zeros(1, NOISE, 16), torch.zeros(1, text, 3, 16)), {})
        shard = given.chunk(ranks, dim=1)[rank]
        streams = contract.read((shard,), {})
        parts.append(streams.hidden_states)
        assert torch.equal(contract.pack(streams).nan_to_num(7.0), shard.nan_to_num(7.0))
    assert [part.shape[1] for part in parts] == held
    assert torch.equal(torch.cat(parts, dim=1), noise)


class ByAddress:
    """What xfuser does with a mask: it keeps what it made of the last, by address and shape."""

    def __init__(self) -> None:
        self._attn_mask_cache: tuple[Any, ...] | None = None
        self.built = 0

    def forward(self, hidden: Any, text: Any, timestep: Any, positions: Any, mask: Any) -> int:
        if mask is None:
            return 0
        key = mask.data_ptr(), mask.shape
        if self._attn_mask_cache is None or self._attn_mask_cache[:2] != key:
            self.built += 1
            self._attn_mask_cache = (*key, int(mask.sum()))
        return self._attn_mask_cache[2]


def test_a_later_mask_at_the_same_address_is_another_one() -> None:
    """Both branches keep theirs; another size of picture beside the same text is another one."""

    class Mended(ByAddress):
        forward = ByAddress.forward

    memory = torch.tensor([[True, True, False]])
    one, other = memory.view(1, 3), memory.clone()
    picture = torch.zeros(1, 4, 2)
    model = ByAddress()
    assert model.forward(picture, None, None, None, one) == 2
    memory[:] = True
    assert model.forward(picture, None, None, None, memory.view(1, 3)) == 2  # the bug

    module: Any = types.ModuleType("krea2")
    module.xFuserKrea2Transformer2DWrapper = Mended
    krea2.keep_masks_by_tensor(module)
    memory[0, 2] = False
    mended: Any = Mended()
    for _ in range(3):
        assert mended.forward(picture, None, None, None, one) == 2
        assert mended.forward(picture, None, None, None, other) == 2
        assert mended.forward(picture, None, None, None) == 0
    assert mended.built == 2
    mended.forward(torch.zeros(1, 9, 2), None, None, None, one)
    assert mended.built == 3
    memory[:] = True
    assert mended.forward(picture, None, None, None, memory.view(1, 3)) == 3

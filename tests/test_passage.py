"""A forward pass on its way through the blocks: what is computed, stood in for and remembered.

On arithmetic blocks, whose outputs prove which path ran.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from support.stack import JOINT, TOKENS, Stack, ones, plan_of

from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.models.spans import span_of_blocks
from xfuser_fastcache.tokens.base import CannotForecast

every_granularity = pytest.mark.parametrize("granularity", ["stack", 3, "block"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("blocks", "granularity", "spans"),
    [
        (5, "stack", [0] * 5),
        (3, "block", [0, 1, 2]),
        (5, 2, [0, 0, 0, 1, 1]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (2, 7, [0, 1]),
        (4, 1, [0] * 4),
    ],
)
def test_blocks_are_cut_into_spans(blocks: int, granularity: Any, spans: list[int]) -> None:
    assert span_of_blocks(blocks, granularity) == spans


def test_a_skipped_span_runs_no_block_and_moves_its_input_by_the_anchors_residual() -> None:
    stack = Stack(num_warmup_steps=1)
    stack.added = [1.0, 2.0, 4.0, 8.0]
    assert torch.equal(stack(ones(), 1.0), ones(16.0))
    stack.added = [100.0] * 4
    assert torch.equal(stack(ones(3.0), 0.9), ones(18.0))
    assert (stack.ran, stack.flags) == ([], [0, 1])


def test_each_span_is_decided_by_its_own_change() -> None:
    stack = Stack(blocks=2, granularity="block", cache_ratio_threshold=0.1)
    for level, second in ((1.0, 0.0), (0.9, 1.0), (0.8, 2.0)):
        stack.added = [second, 1.0]
        stack(ones(), level)
    # The first span's input stands still, the second's moved in the step before.
    assert (stack.flags, stack.ran) == ([0, 0, 0b01], [1])


def test_a_skipped_span_hands_its_input_on_up_to_its_last_block() -> None:
    stack = Stack(blocks=3, num_warmup_steps=1)
    stack.added = [1.0] * 3
    stack(ones(), 1.0)
    stack.open(0.9)
    handed = [stack.run(index, ones(2.0)) for index in range(3)]
    assert [x[0, 0, 0].item() for x in handed] == [2.0, 2.0, 5.0]


@pytest.mark.parametrize(("factor", "skips"), [(0.99, True), (1.01, False)])
def test_the_change_is_measured_against_the_last_computed_step(factor: float, skips: bool) -> None:
    epsilon = 0.1
    # Equal changes in all tokens: as many degrees of freedom as tokens. Two steps after the anchor
    # a change counts twice.
    delta = epsilon * (chi2.ppf(0.05, TOKENS) / TOKENS) ** 0.5 * factor / 2
    stack = Stack(num_warmup_steps=1, cache_ratio_threshold=epsilon)
    for level, value in ((1.0, 1.0), (0.9, 1.0 + delta / 2), (0.8, 1.0 + delta)):
        stack(ones(value), level)
    assert stack.flags == [0, 1, int(skips)]


@pytest.mark.parametrize(("factor", "skips"), [(0.99, True), (1.01, False)])
def test_a_later_spans_last_change_is_scaled_to_the_gap_to_its_newest_anchor(
    factor: float, skips: bool
) -> None:
    epsilon = 0.1
    stack = Stack(blocks=2, granularity="block", cache_ratio_threshold=epsilon)
    # Measured over a gap of 0.1 in noise, used over one of 0.4.
    delta = epsilon * (chi2.ppf(0.05, TOKENS) / TOKENS) ** 0.5 * factor / 4
    for level, added in ((1.0, 0.0), (0.9, delta), (0.5, delta)):
        stack.added = [added, 0.0]
        stack(ones(), level)
    assert stack.flags == [0, 0, 0b11 if skips else 0b01]


@every_granularity
def test_a_threshold_of_zero_computes_even_where_nothing_moves(granularity: Any) -> None:
    stack = Stack(cache_ratio_threshold=0, granularity=granularity, num_warmup_steps=0)
    for level in (1.0, 0.9, 0.8):
        stack(ones(), level)
    assert stack.flags == [0, 0, 0]


def test_no_block_approximation_means_that_all_is_computed() -> None:
    stack = Stack(enable_block_approx=False)
    for level in (1.0, 0.9, 0.8, 0.7):
        stack(ones(), level)
    assert stack.flags == [0, 0, 0, 0]


def test_a_step_without_blocks_takes_part_in_the_consensus() -> None:
    stack = Stack()
    stack.added = []
    stack(ones(), 1.0)
    assert (stack.consensus.collectives, stack.flags) == (1, [0])


def test_both_streams_are_skipped_and_handed_back_in_the_blocks_order() -> None:
    class Joint(Stack):
        contract = JOINT

    stack = Joint(blocks=2, num_warmup_steps=1)

    def forward(x: torch.Tensor, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return encoder_hidden_states + 5, x + 1

    for level in (1.0, 0.9):
        x, text = ones(level), ones(10 * level)[:, :2]
        stack.open(level, x)
        for index in range(2):
            given = {"encoder_hidden_states": text}
            text, x = stack.engine.run_block(index, forward, (x,), given)
        stack.engine.close()
    assert stack.flags == [0, 1]
    torch.testing.assert_close(x, ones(2.9))
    torch.testing.assert_close(text, ones(19.0)[:, :2])


# ---- branches and generations -------------------------------------------------------------------


@pytest.mark.parametrize("names", [(None, None), ("cond", "uncond")], ids=["by order", "by name"])
def test_branches_have_anchors_of_their_own(names: tuple[str | None, ...]) -> None:
    stack = Stack(num_warmup_steps=1)
    latents = ones()
    for branch, name in enumerate(names):
        stack.added = [10.0**branch] * 4
        stack(latents, 1.0, name=name)
    latents = ones()
    assert [stack(latents, 0.9, name=n)[0, 0, 0].item() for n in names] == [5.0, 41.0]
    assert stack.places == [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]


def test_another_shape_is_a_branch_of_its_own_that_is_computed_first() -> None:
    """A batch that guidance leaves half: the picture goes on, with anchors of its own."""
    stack = Stack(num_warmup_steps=0)
    stack.added = [1.0] * 4
    half, levels = ones()[:, :3], (1.0, 0.9, 0.8, 0.7, 0.6)
    for level in levels:
        x = ones() if level > 0.8 else half
        assert torch.equal(stack(x, level), x + 4)
    assert stack.places == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1), (4, 1, 1)]
    assert stack.reasons[2] == "no anchor"
    assert stack.engine.statistics()["generations"] == 1


def test_a_new_generation_forgets_the_anchors_of_the_old_one() -> None:
    stack = Stack(num_warmup_steps=0)
    stack(ones(), 1.0), stack(ones(), 0.9)
    assert stack.flags == [0, 1]
    stack(ones(), 1.0)
    assert (stack.flags, stack.ran) == ([0], [0, 1, 2, 3])


def test_after_an_exception_a_generation_starts_even_where_the_noise_goes_on_falling() -> None:
    stack = Stack(num_warmup_steps=1)
    stack(ones(), 1.0)
    stack.open(0.9)
    stack.engine.abandon(ValueError("a block failed"))
    stack(ones(), 0.8)
    assert (stack.engine.decisions.entries, stack.ran) == ([(1, 0, 0, 0)], [0, 1, 2, 3])


def test_a_rank_that_counts_no_tokens_computes_when_others_see_a_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = Stack(group=DecisionGroup(counts_tokens=False), num_warmup_steps=0)
    monkeypatch.setattr(stack.consensus, "wait", lambda ticket: [[0] * 6 + [9, 1, 0]])
    stack.added = [1.0] * 4
    assert [stack(ones(), level)[0, 0, 0].item() for level in (1.0, 0.9)] == [5.0, 5.0]
    assert (stack.flags, stack.ran) == ([0, 0], [0, 1, 2, 3])


# ---- blocks that the model leaves out -----------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_span_begins_with_the_first_block_that_the_model_calls(block: int) -> None:
    stack = Stack(granularity=1, num_warmup_steps=1)
    stack.added = [1.0] * 4
    # Another branch with all blocks, whose flag and input must not be taken for this one's.
    for level, wanted in ((1.0, 4.0), (0.9, 5.0), (0.8, 6.0)):
        stack(ones(50.0), level, name="all")
        found = stack(ones(wanted - 3), level, left_out=block, name="fewer")
        assert found[0, 0, 0].item() == wanted
    assert stack.places == [(s, branch, int(s > 0)) for s in range(3) for branch in (0, 1)]


@pytest.mark.parametrize("block", [1, 3])
def test_a_span_whose_last_block_the_model_leaves_out_is_computed(block: int) -> None:
    stack = Stack(granularity=2, num_warmup_steps=0)
    stack.added = [1.0] * 4
    for level in (1.0, 0.9, 0.8, 0.7):
        assert torch.equal(stack(ones(), level, left_out=block), ones(4.0))
    whole = 0b10 if block == 1 else 0b01
    assert stack.flags == [0, 0 if block == 1 else whole, whole, whole]


def test_a_last_block_left_out_in_one_branch_concerns_no_other() -> None:
    stack = Stack(num_warmup_steps=1)
    for level in (1.0, 0.9, 0.8):
        stack(ones(), level, name="all"), stack(ones(), level, left_out=3, name="fewer")
    assert stack.places == [(s, b, int(s > 0 and b == 0)) for s in range(3) for b in (0, 1)]


def test_a_skipped_span_whose_last_block_is_left_out_is_computed_again() -> None:
    """The forecast has had no place: as the hook does, the whole forward pass runs once more."""
    stack = Stack(granularity=2, num_warmup_steps=1, max_consecutive_skips=9)
    stack.added = [1.0] * 4
    for level in (1.0, 0.9, 0.8):
        stack(ones(), level)
    stack.ran = []
    stack.open(0.7)
    x = stack.run(0, ones())
    with pytest.raises(CannotForecast, match="last block of span 0"):
        stack.run(2, x)
    stack.engine.recompute()
    x = ones()
    for index in (0, 2, 3):
        x = stack.run(index, x)
    stack.engine.close()
    assert torch.equal(x, ones(4.0)) and stack.ran == [0, 2, 3]
    statistics = stack.engine.statistics()
    assert (statistics["recomputed"], statistics["generations"]) == (1, 1)
    # Its decision stands, and what it saves is taken back.
    assert stack.flags == [0, 0b01, 0b11, 0b11]
    assert statistics["estimated_flops_saved_ratio"] == pytest.approx((0.5 + 1 + 1 - 1) / 4)
    # What was remembered is forgotten: the mask or the gate may ask for a skip, there is no anchor.
    assert torch.equal(stack(ones(), 0.6), ones(5.0)) and stack.ran == [0, 1, 2, 3]
    assert torch.equal(stack(ones(), 0.5), ones(5.0)) and stack.ran == []


@pytest.mark.parametrize("last", [True, False])
def test_a_forward_pass_that_ends_within_a_skipped_span_is_computed_again(last: bool) -> None:
    stack = Stack(num_warmup_steps=1)
    stack.added = [1.0] * 4
    stack(ones(), 1.0)
    with pytest.raises(CannotForecast, match="last block of span 0"):
        stack(ones(), 0.9, left_out=3)
    stack.engine.recompute()
    if last:
        # It may fail for a reason of its own.
        stack.engine.abandon(ValueError())
        assert torch.equal(stack(ones(), 0.8), ones(5.0)) and stack.places == [(0, 0, 0)]
        return
    assert torch.equal(stack.run(0, ones()), ones(2.0))
    stack.engine.close()
    assert stack.engine.statistics()["recomputed"] == 1


def test_a_skip_without_anchors_is_computed_and_saves_nothing() -> None:
    """A mask decides without measuring, and the output of the step before was not seen."""
    plan = plan_of(1.0, 0.9, 0.8)
    stack = Stack(granularity=2, steps_mask=[1, 0, 1])
    stack.added = [1.0] * 4
    stack(ones(), 1.0, left_out=1, plan=plan)
    assert torch.equal(stack(ones(), 0.9, plan=plan), ones(5.0))
    # The second span had one, and is skipped.
    assert (stack.ran, stack.flags) == ([0, 1], [0, 0b11])
    assert stack.engine.statistics()["estimated_flops_saved_ratio"] == pytest.approx(0.5 / 2)


def test_a_block_outside_of_a_forward_pass_runs_uncached() -> None:
    stack = Stack()
    stack.added = [1.0] * 4
    assert torch.equal(stack.run(2, ones()), ones(2.0))
    assert stack.engine.statistics()["steps"] == 0


def test_a_block_that_is_handed_on_looks_nothing_up() -> None:
    """All but one block of a skipped stack do this: on many ranks it is what a step costs most."""
    stack = Stack(blocks=40, num_warmup_steps=1)
    stack(ones(), 1.0)
    calls: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and "xfuser_fastcache" in code.co_filename and code.co_name[0] != "<":
            calls.append(code.co_name)

    sys.setprofile(profile)
    try:
        stack(ones(3.0), 0.9)
    finally:
        sys.setprofile(None)
    assert stack.flags[-1] == 1
    assert calls.count("handed_on") == 39
    # The engine's and the passage's run_block, and handed_on itself.
    few = 3 * 39  # beside what the step does once
    assert few <= len(calls) <= few + 130, len(calls)

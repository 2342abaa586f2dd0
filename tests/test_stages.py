"""Several pipeline stages: decisions lag, patches have anchors of their own, stages may stagger.

One process stands for one stage; what the others do is not needed, or told.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.stack import DIM, TOKENS, Stack, ones, plan_of

from xfuser_fastcache.consensus.topology import DecisionGroup, Position
from xfuser_fastcache.measurements.moments import FRACTION as MOMENTS_FRACTION
from xfuser_fastcache.measurements.moments import LOWER, REFERENCE, SLOTS
from xfuser_fastcache.measurements.moments import TOKENS as TOKENS_SLOT

FIRST_OF_TWO = DecisionGroup(stages=2)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def lagging(lag: int, **options: Any) -> Stack:
    """Return the first of two stages; bit 0 of its flags is of the span that it begins.

    Where a later stage begins a span as well, decisions lag by two steps.
    """
    if lag == 1:
        return Stack(group=FIRST_OF_TWO, **options)
    return Stack(group=FIRST_OF_TWO, held=(2, 2), granularity=2, **options)


def own(stack: Stack) -> list[int]:
    return [flags & 1 for flags in stack.flags]


@pytest.mark.parametrize("lag", [1, 2])
def test_a_pipeline_decides_once_a_step_from_an_earlier_one(lag: int) -> None:
    stack = lagging(lag, num_warmup_steps=0, max_consecutive_skips=9)
    for index in range(6):
        stack.pipelined(ones(), 1 - index / 10, patched=index > 0)
    # Step 0 had nothing to be measured against; step 1 had.
    assert own(stack) == [int(step > lag) for step in range(6)]
    assert stack.consensus.collectives == 6


@pytest.mark.parametrize(
    ("stage", "granularity", "measured"),
    [(0, "stack", [6]), (1, "stack", [0]), (0, "block", [6] * 2 + [0] * 2),
     (1, "block", [0] * 2 + [6] * 2), (0, 2, [6, 0]), (1, 3, [0, 6, 6])],
)  # fmt: skip
def test_a_span_is_measured_once_by_the_stage_that_begins_it(
    stage: int, granularity: Any, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four blocks each of two stages holds two; tokens measured are counted by span."""
    group = DecisionGroup(stages=2, stage=stage)
    stack = Stack(group=group, held=(2, 2), granularity=granularity)
    posted, post = [], stack.consensus.post
    monkeypatch.setattr(
        stack.consensus,
        "post",
        lambda header, moments: (
            posted.append(moments[:, TOKENS_SLOT].tolist()) or post(header, moments)
        ),
    )
    for patch in range(2):
        stack(ones()[:, :3], 1.0, Position(patch, (3, 3), True))
    assert posted == [measured]


@pytest.mark.parametrize(("stages", "patches"), [(2, 2), (4, 4), (2, 4), (3, 2)])
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize(
    ("masked", "decided"),
    [
        # Two skips in a row at most; the first two steps and the last always.
        (False, [1, 4, 7, 10, 11]),
        (True, [1, 4, 7, 10, 11]),
        (True, [1, 4, 7, 11]),
        (True, list(range(1, 12))),
    ],
    ids=["gate", "mask", "mask, last alone", "mask of all"],
)
def test_staggered_stages_act_on_the_next_decision_where_the_first_stage_is_at_it(
    masked: bool, decided: list[int], stages: int, patches: int, stagger: bool
) -> None:
    """The flags of a stage and patch are those of the first stage, a step earlier from its turn."""
    steps = 12
    # Step 0 has no patches.
    plan = plan_of(*(1 - index / steps for index in range(steps)))

    unchanged = [0] * SLOTS
    unchanged[REFERENCE + LOWER], unchanged[TOKENS_SLOT] = 2**MOMENTS_FRACTION, 6

    def computed(stage: int) -> dict[int, list[int]]:
        """Return the steps at which a stage computes, by patch."""
        mask = [int(step in (0, *decided)) for step in range(steps)] if masked else None
        stack = Stack(
            blocks=stages,
            group=DecisionGroup(stages=stages, stage=stage),
            held=(1,) * stages,
            cache_ratio_threshold=0.05,
            max_consecutive_skips=2,
            steps_mask=mask,
            stagger_stages=stagger,
        )
        # What the first stage measures: nothing has changed.
        stack.consensus.wait = lambda ticket: [unchanged]
        ran: dict[int, list[int]] = {patch: [] for patch in range(patches)}
        for step, planned in enumerate(plan.steps):
            for patch in range(patches) if step else [0]:
                position = Position(patch, (3,) * patches, patched=step > 0)
                tokens = 3 if step else 3 * patches
                x = torch.ones(1, tokens, DIM)
                stack(x, planned.timestep, position, plan=plan, stages=stages)
                ran[patch] += [step] * len(stack.ran)
        assert stack.engine.statistics()["collectives"] == steps
        return ran

    for stage in range(stages):
        for patch, ran in computed(stage).items():
            ahead = stagger and stage + patch >= patches
            # The gate is not asked at step 1 and the last. In a mask, stages are ahead of those,
            # too, but for the second of two computed steps at the end.
            always = {1, steps - 1} if not masked else {steps - 1} & {x + 1 for x in decided}
            wanted = {step - ahead for step in decided} | always
            assert [step for step in ran if step] == sorted(wanted - {0}), (stage, patch)


def test_synchronous_pipeline_steps_are_computed() -> None:
    stack = Stack(group=FIRST_OF_TWO, num_warmup_steps=0)
    for index in range(6):
        stack.pipelined(ones(), 1 - index / 10, patched=index == 5)
    assert stack.flags == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("patched_from", [1, 3])
def test_a_skipped_patch_is_forecast_from_its_own_anchor(patched_from: int) -> None:
    stack = Stack(group=FIRST_OF_TWO, num_warmup_steps=3)
    x = torch.arange(float(TOKENS * DIM)).reshape(1, TOKENS, DIM)
    stack.added = [1.0] * 4
    for index in range(3):
        stack.pipelined(x, 1 - index / 10, patched=index >= patched_from)
    stack.added = [100.0] * 4
    assert torch.equal(stack.pipelined(x + 7, 0.7, patched=True), x + 11)
    assert stack.flags == [0, 0, 0, 1]


def test_an_anchor_outlives_the_buffer_that_it_came_in() -> None:
    """The next patch is received into it."""
    stack = Stack(group=FIRST_OF_TWO, num_warmup_steps=0)
    stack.added = [1.0] * 4
    buffer = torch.ones(1, 3, DIM)
    for step in range(3):
        for patch in range(2):
            # Patch 0 sees 1 and patch 1 sees 50, at each step, and as the step before has left it.
            buffer.fill_(50.0 if patch else 1.0)
            position = Position(patch, (3, 3), patched=step > 0)
            if step or not patch:
                whole = torch.cat((torch.ones(1, 3, DIM), 50 * torch.ones(1, 3, DIM)), dim=1)
                stack(buffer if step else whole, 1 - step / 10, position)
    assert stack.flags == [0, 0, 1]
    again = stack(buffer.fill_(1.0), 0.7, Position(0, (3, 3), True))
    assert torch.equal(again, torch.full((1, 3, DIM), 5.0))
    assert stack.flags == [0, 0, 1, 1] and stack.ran == []


def test_a_pipeline_computes_at_the_first_decision_that_knows_of_a_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And forgets what keys and values were."""
    stack = Stack(group=FIRST_OF_TWO, num_warmup_steps=0, max_consecutive_skips=99)
    forgotten: list[int] = []
    monkeypatch.setattr(stack.engine.plan.keys, "forget", lambda: forgotten.append(index))
    for index in range(9):
        x = ones(torch.nan if index == 4 else 1.0)
        stack.pipelined(x, 1 - index / 10, patched=index > 0)
    assert stack.flags == [0, 0, 1, 1, 1, 0, 1, 1, 1]
    assert forgotten == [0, 5, 5]  # as the generation begins, and of each patch
    assert stack.engine.statistics()["nonfinite_steps"] == 1


@pytest.mark.parametrize("lag", [1, 2])
def test_a_pipeline_skips_by_the_mask_from_its_first_patched_step_on(lag: int) -> None:
    stack = lagging(lag, steps_mask=[1, 0, 0, 0, 1, 0], num_steps=6)
    for step in range(6):
        stack.pipelined(ones(), 1 - step / 10, patched=step > 1)
    assert own(stack) == [0, 0, 1, 1, 0, 1]
    assert stack.reasons[1] == "synchronous step of the pipeline"
    assert {*stack.reasons[:1], *stack.reasons[2:]} == {"steps mask"}

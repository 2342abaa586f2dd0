"""Generations, steps, branches and patches are told apart by what a transformer is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xfuser_fastcache.clock.timeline import Call, Schedule, Timeline
from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.models.adapter import Step

WHOLE = Position()


def schedule(*levels: float) -> Schedule:
    """Return a new plan, as `set_timesteps` makes one."""
    return Schedule(torch.tensor(levels), tuple(Step(level, level) for level in levels))


def opened(timeline: Timeline, level: float, **given: Any) -> Call:
    """Open a forward pass whose timestep is its noise level."""
    given = {"signature": "8x8", "position": WHOLE, **given}
    return timeline.open(level, level, **given)


def places(timeline: Timeline, *levels: float, **given: Any) -> list[tuple[int, int, int]]:
    calls = [opened(timeline, level, **given) for level in levels]
    return [(call.generation, call.step, call.branch) for call in calls]


def test_falling_noise_counts_steps() -> None:
    timeline = Timeline()
    calls = [opened(timeline, level) for level in (1.0, 0.7, 0.2)]
    assert [(c.generation, c.step, c.branch) for c in calls] == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
    assert [c.starts_generation for c in calls] == [True, False, False]
    assert [c.noise_level for c in calls] == [1.0, 0.7, 0.2]
    assert all(c.opens_step for c in calls)


def test_rising_noise_starts_a_generation() -> None:
    assert places(Timeline(), 1.0, 0.5, 0.8, 0.3) == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]


@pytest.mark.parametrize("level", [0.5, 0.3])
def test_another_signature_starts_a_generation(level: float) -> None:
    timeline = Timeline()
    places(timeline, 1.0, 0.5)
    call = opened(timeline, level, signature="16x16")
    assert (call.generation, call.step, call.branch, call.starts_generation) == (1, 0, 0, True)
    assert places(timeline, 0.2, signature="16x16") == [(1, 1, 0)]


def test_new_timesteps_of_the_scheduler_start_a_generation() -> None:
    timeline = Timeline()
    levels = (1.0, 0.5)
    first, second = schedule(*levels), schedule(*levels)
    assert places(timeline, *levels, schedule=first) == [(0, 0, 0), (0, 1, 0)]
    # Interrupted or not: the level does not even rise.
    assert places(timeline, 0.5, schedule=second) == [(1, 0, 0)]


def test_one_step_generations_are_told_apart_by_the_scheduler() -> None:
    timeline = Timeline()
    calls = [opened(timeline, 1.0, schedule=schedule(1.0)) for _ in range(3)]
    assert [(c.generation, c.step, c.branch) for c in calls] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert all(c.is_last_step and not c.more_steps_follow for c in calls)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_the_same_timestep_again_is_the_next_branch(branches: int) -> None:
    timeline = Timeline()
    found = places(timeline, *(level for level in (1.0, 0.5) for _ in range(branches)))
    assert found == [(0, step, branch) for step in (0, 1) for branch in range(branches)]


@pytest.mark.parametrize("names", [("cond",), ("cond", "uncond"), ("a", "b", "c")])
def test_a_name_that_comes_again_at_the_same_timestep_starts_a_generation(
    names: tuple[str, ...],
) -> None:
    timeline = Timeline()
    found = [
        (call.generation, call.step, call.branch)
        for _ in range(2)
        for name in names
        for call in [opened(timeline, 1.0, branch_name=name)]
    ]
    assert found == [(generation, 0, b) for generation in (0, 1) for b in range(len(names))]


def test_a_named_branch_keeps_its_index_whoever_else_is_called() -> None:
    timeline = Timeline()
    steps = {1.0: "ab", 0.8: "b", 0.6: "cba", 0.4: "c", 0.2: "ca"}
    found = [
        (call.step, call.branch)
        for level, names in steps.items()
        for name in names
        for call in [opened(timeline, level, branch_name=name)]
    ]
    assert found == [(0, 0), (0, 1), (1, 1), (2, 2), (2, 1), (2, 0), (3, 2), (4, 2), (4, 0)]
    # A generation counts its branches anew.
    assert opened(timeline, 1.0, branch_name="c").branch == 0


def test_calls_with_and_without_a_name_are_never_one_branch() -> None:
    timeline = Timeline()
    found = [
        (call.step, call.branch)
        for level, names in {1.0: ("a", None, None), 0.5: (None, None, "a")}.items()
        for name in names
        for call in [opened(timeline, level, branch_name=name)]
    ]
    assert len(found) == len(set(found))


def test_a_timeline_says_how_far_it_is_and_whether_there_is_a_new_plan() -> None:
    timeline, plan = Timeline(), schedule(1.0, 0.5)
    assert timeline.reached is None and not timeline.replanned(plan)
    opened(timeline, 1.0, schedule=plan), opened(timeline, 0.5, schedule=plan)
    assert timeline.reached == 0.5
    assert not timeline.replanned(plan) and not timeline.replanned(None)
    assert timeline.replanned(schedule(1.0, 0.5))
    timeline.restart()
    assert timeline.reached is None


def test_names_count_anew_at_each_step() -> None:
    timeline = Timeline()
    found = [
        (call.generation, call.step, call.branch)
        for level in (1.0, 0.5)
        for name in ("cond", "uncond")
        for call in [opened(timeline, level, branch_name=name)]
    ]
    assert found == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]


def test_after_a_restart_the_next_call_starts_a_generation() -> None:
    timeline = Timeline()
    places(timeline, 1.0, 0.7)
    timeline.restart()
    assert places(timeline, 0.7, 0.4) == [(1, 0, 0), (1, 1, 0)]


def test_later_patches_belong_to_the_step_that_the_first_one_opened() -> None:
    timeline = Timeline()
    patches = [Position(patch, (16, 24, 8), patched=True) for patch in range(3)]
    opened(timeline, 1.0, position=Position(0, (16, 24, 8)))
    calls = [opened(timeline, level, position=p) for level in (0.7, 0.4) for p in patches]
    assert [(c.step, c.branch, c.opens_step) for c in calls] == [
        (step, 0, patch == 0) for step in (1, 2) for patch in range(3)
    ]
    assert [c.position.is_last_patch for c in calls] == [False, False, True] * 2
    assert not any(c.starts_generation for c in calls)


def test_patches_of_a_named_branch_are_no_repetition_of_the_name() -> None:
    timeline = Timeline()
    calls = [
        opened(timeline, 1.0, position=Position(patch, (4, 4), patched=True), branch_name=name)
        for name in ("cond", "uncond")
        for patch in range(2)
    ]
    assert [(c.generation, c.branch, c.opens_step) for c in calls] == [
        (0, 0, True), (0, 0, False), (0, 1, True), (0, 1, False),
    ]  # fmt: skip


@pytest.mark.parametrize("patched", [True, False])
def test_a_place_is_told_in_words(patched: bool) -> None:
    timeline = Timeline()
    places(timeline, 1.0, 0.5, 0.5)
    position = Position(0, (4, 4), patched)
    words = "generation 0, step 2, branch 0" + (", patch 0" if patched else "")
    assert opened(timeline, 0.2, position=position).place == words


def test_num_steps_says_which_step_is_the_last() -> None:
    timeline = Timeline(num_steps=3)
    calls = [opened(timeline, level) for level in (1.0, 0.7, 0.4, 0.2, 1.0)]
    assert [c.is_last_step for c in calls] == [False, False, True, True, False]
    assert [c.more_steps_follow for c in calls] == [True, True, False, False, True]


def test_without_a_plan_the_last_step_is_unknown() -> None:
    timeline = Timeline()
    calls = [opened(timeline, level) for level in (1.0, 0.0)]
    assert not any(c.is_last_step or c.more_steps_follow for c in calls)


def test_the_plan_says_which_step_is_the_last_also_against_num_steps() -> None:
    timeline, plan = Timeline(num_steps=2), schedule(1.0, 0.7, 0.4)
    calls = [opened(timeline, level, schedule=plan) for level in plan.timesteps.tolist()]
    assert [c.is_last_step for c in calls] == [False, False, True]
    assert [c.more_steps_follow for c in calls] == [True, True, False]


def test_noise_levels_come_in_the_plans_precision_when_the_model_sees_bf16() -> None:
    levels = tuple(torch.linspace(1.0, 1 / 28, 28, dtype=torch.float64).tolist())
    timeline, plan = Timeline(), schedule(*levels)
    seen = [torch.tensor(level).bfloat16().item() for level in levels]
    assert seen[1] != levels[1]
    calls = [opened(timeline, level, schedule=plan) for level in seen]
    assert tuple(call.noise_level for call in calls) == levels
    assert [call.step for call in calls] == list(range(28))


def test_a_plan_of_another_pipeline_is_ignored() -> None:
    timeline, foreign = Timeline(num_steps=2), schedule(1.0, 0.9)
    calls = [opened(timeline, level, schedule=foreign) for level in (0.95, 0.3)]
    assert [c.noise_level for c in calls] == [0.95, 0.3]
    assert [c.is_last_step for c in calls] == [False, True]


def test_a_plan_without_steps_is_ignored() -> None:
    call = opened(Timeline(), 0.5, schedule=schedule())
    assert (call.noise_level, call.is_last_step) == (0.5, False)

"""Generations, steps, branches and patches of the forward passes of a pipeline's transformers.

Sources of time have tests of their own in `test_sources.py`; here noise is the clock unless a plan
is given.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.stack import arrival, plan_of

from xfuser_fastcache.clock.timeline import Call, Timeline
from xfuser_fastcache.consensus.topology import Position

SMALL, LARGE = (1, 64), (1, 256)


def opened(timeline: Timeline, level: float, *args: Any, **given: Any) -> Call:
    """Open a forward pass whose timestep is its noise level."""
    return timeline.open(arrival(level, *args, **{"shape": SMALL, **given}))


def place(call: Call) -> tuple[int, int, int]:
    return call.generation, call.step, call.branch


def places(timeline: Timeline, *levels: float, **given: Any) -> list[tuple[int, int, int]]:
    return [place(opened(timeline, level, **given)) for level in levels]


def test_falling_noise_counts_steps() -> None:
    timeline = Timeline()
    calls = [opened(timeline, level) for level in (1.0, 0.7, 0.2)]
    assert [place(c) for c in calls] == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
    assert [c.starts_generation for c in calls] == [True, False, False]
    assert [c.noise_level for c in calls] == [1.0, 0.7, 0.2]
    assert all(c.opens_step for c in calls)


def test_rising_noise_starts_a_generation() -> None:
    assert places(Timeline(), 1.0, 0.5, 0.8, 0.3) == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]


@pytest.mark.parametrize("name", [None, "cond"])
def test_another_batch_or_size_is_another_branch_of_the_same_generation(name: str | None) -> None:
    """Anchors of one cannot serve the other; the picture goes on."""
    timeline = Timeline()
    places(timeline, 1.0, 0.5, name=name)
    call = opened(timeline, 0.3, name=name, shape=LARGE)
    assert (place(call), call.starts_generation) == ((0, 2, 1), False)
    assert places(timeline, 0.2, name=name, shape=LARGE) == [(0, 3, 1)]
    # It comes back to what it had.
    assert places(timeline, 0.1, name=name) == [(0, 4, 0)]


def test_new_timesteps_of_the_scheduler_start_a_generation() -> None:
    timeline, levels = Timeline(), (1.0, 0.5)
    assert places(timeline, *levels, plan=plan_of(*levels)) == [(0, 0, 0), (0, 1, 0)]
    # Interrupted or not: the level does not even rise.
    assert places(timeline, 0.5, plan=plan_of(*levels)) == [(1, 0, 0)]


def test_one_step_generations_are_told_apart_by_the_scheduler() -> None:
    timeline = Timeline()
    calls = [opened(timeline, 1.0, plan=plan_of(1.0)) for _ in range(3)]
    assert [place(c) for c in calls] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert all(c.is_last_step and not c.more_steps_follow for c in calls)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("planned", [True, False])
def test_the_same_latents_again_are_the_next_branch(branches: int, planned: bool) -> None:
    timeline, levels = Timeline(), (1.0, 0.5)
    plan = plan_of(*levels) if planned else None
    latents = [torch.ones(1) for _ in levels]
    found = [
        place(opened(timeline, level, x, plan=plan))
        for level, x in zip(levels, latents, strict=True)
        for _ in range(branches)
    ]
    assert found == [(0, step, branch) for step in (0, 1) for branch in range(branches)]


def test_of_a_plan_calls_with_latents_of_their_own_are_branches_too() -> None:
    """What the plan tells apart need not be told by latents."""
    timeline, levels = Timeline(), (1.0, 0.5)
    found = places(timeline, 1.0, 1.0, 0.5, 0.5, plan=plan_of(*levels))
    assert found == [(0, step, branch) for step in (0, 1) for branch in (0, 1)]


@pytest.mark.parametrize("names", [("cond",), ("cond", "uncond"), ("a", "b", "c")])
def test_a_name_that_comes_again_at_the_same_timestep_starts_a_generation(
    names: tuple[str, ...],
) -> None:
    timeline = Timeline()
    found = [place(opened(timeline, 1.0, name=name)) for _ in range(2) for name in names]
    assert found == [(generation, 0, b) for generation in (0, 1) for b in range(len(names))]


def test_a_name_that_comes_again_at_one_step_of_a_context_starts_a_generation() -> None:
    """The context knows no better: a picture of one step looks like that."""
    timeline = Timeline()
    calls = [opened(timeline, 1.0, name="cond", context_step=0) for _ in range(2)]
    assert [place(call) for call in calls] == [(0, 0, 0), (1, 0, 0)]


def test_a_name_that_comes_again_in_another_size_is_another_branch_of_the_step() -> None:
    timeline = Timeline()
    for step, level in enumerate((1.0, 0.5)):
        found = [opened(timeline, level, name="cond", shape=shape) for shape in (SMALL, LARGE)]
        assert [place(call) for call in found] == [(0, step, 0), (0, step, 1)]
    # In a size that the step has had it is a generation.
    assert place(opened(timeline, 0.5, name="cond", shape=LARGE)) == (1, 0, 0)


def test_a_named_branch_keeps_its_index_whoever_else_is_called() -> None:
    timeline = Timeline()
    steps = {1.0: "ab", 0.8: "b", 0.6: "cba", 0.4: "c", 0.2: "ca"}
    found = [
        place(opened(timeline, level, name=name))[1:]
        for level, names in steps.items()
        for name in names
    ]
    assert found == [(0, 0), (0, 1), (1, 1), (2, 2), (2, 1), (2, 0), (3, 2), (4, 2), (4, 0)]
    # A generation counts its branches anew.
    assert opened(timeline, 1.0, name="c").branch == 0


def test_calls_with_and_without_a_name_are_never_one_branch() -> None:
    timeline = Timeline()
    found = []
    for level, names in {1.0: ("a", None, None), 0.5: (None, None, "a")}.items():
        latents = torch.ones(1)
        found += [place(opened(timeline, level, latents, name=name)) for name in names]
    assert {generation for generation, *_ in found} == {0}
    assert len(found) == len(set(found))


def test_a_timeline_says_how_far_it_is_and_whether_there_is_a_new_plan() -> None:
    timeline, plan = Timeline(), plan_of(1.0, 0.5)
    assert timeline.reached is None and not timeline.replanned(plan)
    assert timeline.planned_steps is None and timeline.planned_levels == []
    places(timeline, 1.0, 0.5, plan=plan)
    assert timeline.reached == 0.5
    assert timeline.planned_steps == 2 and timeline.planned_levels == [1.0, 0.5]
    assert not timeline.replanned(plan) and not timeline.replanned(None)
    assert timeline.replanned(plan_of(1.0, 0.5))
    timeline.restart()
    assert timeline.reached is None


def test_names_count_anew_at_each_step() -> None:
    timeline = Timeline()
    found = [
        place(opened(timeline, level, name=name))
        for level in (1.0, 0.5)
        for name in ("cond", "uncond")
    ]
    assert found == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]


def test_after_a_restart_the_next_call_starts_a_generation() -> None:
    timeline = Timeline()
    places(timeline, 1.0, 0.7)
    timeline.restart()
    assert places(timeline, 0.7, 0.4) == [(1, 0, 0), (1, 1, 0)]


def test_after_a_restart_a_plan_is_entered_where_it_stands() -> None:
    """A forward pass that failed leaves the scheduler's plan behind, and its place in it."""
    timeline, plan = Timeline(), plan_of(1.0, 0.7, 0.4)
    places(timeline, 1.0, 0.7, plan=plan)
    timeline.restart()
    call = opened(timeline, 0.4, plan=plan)
    assert (place(call), call.planned_step, call.is_last_step) == ((1, 0, 0), 2, True)


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
        opened(timeline, 1.0, position=Position(patch, (4, 4), patched=True), name=name)
        for name in ("cond", "uncond")
        for patch in range(2)
    ]
    assert [(c.generation, c.branch, c.opens_step) for c in calls] == [
        (0, 0, True), (0, 0, False), (0, 1, True), (0, 1, False),
    ]  # fmt: skip


@pytest.mark.parametrize("patched", [True, False])
def test_a_place_is_told_in_words(patched: bool) -> None:
    timeline = Timeline()
    places(timeline, 1.0, 0.5)
    position = Position(0, (4, 4), patched)
    words = "generation 0, step 2, branch 0" + (", patch 0" if patched else "")
    assert opened(timeline, 0.2, position=position).place == words


# ---- the last step ------------------------------------------------------------------------------


def test_num_steps_says_which_step_is_the_last() -> None:
    timeline = Timeline(num_steps=3)
    calls = [opened(timeline, level) for level in (1.0, 0.7, 0.4, 0.2, 1.0)]
    assert [c.is_last_step for c in calls] == [False, False, True, True, False]
    assert [c.more_steps_follow for c in calls] == [True, True, False, False, True]
    assert timeline.planned_steps == 3


def test_without_a_plan_the_last_step_is_unknown() -> None:
    timeline = Timeline()
    calls = [opened(timeline, level) for level in (1.0, 0.0)]
    assert not any(c.is_last_step or c.more_steps_follow for c in calls)


def test_the_plan_says_which_step_is_the_last_also_against_num_steps() -> None:
    timeline, plan = Timeline(num_steps=2), plan_of(1.0, 0.7, 0.4)
    calls = [opened(timeline, step.timestep, plan=plan) for step in plan.steps]
    assert [c.is_last_step for c in calls] == [False, False, True]
    assert [c.more_steps_follow for c in calls] == [True, True, False]


def test_what_follows_is_the_next_entry_of_the_plan() -> None:
    timeline, plan = Timeline(), plan_of(1.0, 0.7, 0.4)
    following = [timeline.following(opened(timeline, s.timestep, plan=plan)) for s in plan.steps]
    found = [c and (c.step, c.planned_step, c.noise_level, c.is_last_step) for c in following]
    assert found == [(1, 1, 0.7, False), (2, 2, 0.4, True), None]
    unplanned = Timeline()
    assert unplanned.following(opened(unplanned, 1.0)) is None


@pytest.mark.parametrize("levels", [(0.95, 0.3), (1.0, 0.3)], ids=["never followed", "left"])
def test_a_plan_of_another_pipeline_is_ignored(levels: tuple[float, ...]) -> None:
    timeline, foreign = Timeline(num_steps=2), plan_of(1.0, 0.9)
    calls = [opened(timeline, level, plan=foreign) for level in levels]
    assert [c.noise_level for c in calls] == list(levels)
    assert [c.step for c in calls] == [0, 1]
    assert calls[1].is_last_step


def test_a_plan_without_steps_is_ignored() -> None:
    call = opened(Timeline(), 0.5, plan=plan_of())
    assert (call.noise_level, call.is_last_step) == (0.5, False)


# ---- several denoisers --------------------------------------------------------------------------


def test_steps_count_through_where_another_denoiser_takes_over() -> None:
    timeline, plan = Timeline(), plan_of(1.0, 0.8, 0.6, 0.4)
    calls = [
        opened(timeline, step.timestep, plan=plan, denoiser=int(index > 1))
        for index, step in enumerate(plan.steps)
    ]
    assert [place(c) for c in calls] == [(0, step, 0) for step in range(4)]
    assert [c.entered for c in calls] == [0, 0, 2, 2]
    # The one before the switch is no last step.
    assert [c.is_last_step for c in calls] == [False, False, False, True]


@pytest.mark.parametrize("name", [None, "cond"])
def test_denoisers_that_take_turns_within_a_step_have_branches_of_their_own(
    name: str | None,
) -> None:
    timeline, plan = Timeline(), plan_of(1.0, 0.5)
    found = []
    for level in (1.0, 0.5):
        latents = torch.ones(1)
        for number in (0, 1):
            call = opened(timeline, level, latents, plan=plan, denoiser=number, name=name)
            found.append((call.step, call.branch, call.entered))
    assert found == [(0, 0, 0), (0, 0, 0), (1, 0, 0), (1, 0, 0)]

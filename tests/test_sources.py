"""Where the clock reads the time, source by source: what each sees, and when it hands on.

Plans are those of real sizes in half precision, where neighbouring timesteps are often equal.
"""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from support.stack import arrival, plan_of

from xfuser_fastcache.clock.plan import Plan, Timestep
from xfuser_fastcache.clock.sources import Arrival
from xfuser_fastcache.clock.timeline import Call, Timeline

STEPS = 100
# What FLUX shifts its sigmas by, by pixels a side.
SHIFTS = {size: calculate_shift((size // 16) ** 2) for size in (1024, 1536, 2048)}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
every_size = pytest.mark.parametrize("size", SHIFTS)


def shifted(size: int, steps: int = STEPS) -> Plan:
    """Return the plan of FLUX for a size of picture."""
    sigmas = [1 - step / steps for step in range(steps)]
    factor = math.exp(SHIFTS[size])
    return plan_of(*(factor / (factor + 1 / sigma - 1) for sigma in sigmas))


def seen(level: float, dtype: torch.dtype, **given: Any) -> Arrival:
    """Return a forward pass as FLUX makes one: rounded, scaled, and rounded once more."""
    timestep = (torch.tensor(level * 1000).to(dtype) / 1000).to(dtype)
    return Arrival(
        latents=given.pop("latents", torch.ones(1)),
        read_timestep=lambda: timestep,
        noise_level_of=float,
        **given,
    )


def unreadable(**given: Any) -> Arrival:
    """Return a forward pass whose timestep nobody may read: on a GPU each reading waits."""

    def read() -> torch.Tensor:
        raise AssertionError("a timestep was read")

    return Arrival(
        latents=torch.ones(1), read_timestep=read, noise_level_of=float, shape=(1,), **given
    )


def scheduler(plan: Plan) -> Any:
    return SimpleNamespace(step_index=None, begin_index=None, timesteps=plan.timesteps)


def source_of(timeline: Timeline) -> str:
    assert timeline.source is not None
    return timeline.source.name


def planned(calls: list[Call]) -> list[tuple[int, int]]:
    return [(call.generation, call.planned_step) for call in calls]


# ---- the scheduler's counter --------------------------------------------------------------------


@every_dtype
@every_size
def test_the_counter_tells_every_step_whatever_the_timesteps_are_rounded_to(
    size: int, dtype: torch.dtype
) -> None:
    timeline, plan = Timeline(), shifted(size)
    clock, calls = scheduler(plan), []
    for index, step in enumerate(plan.steps):
        # Schedulers have no index before their first step.
        clock.step_index = index or None
        given = {"latents": torch.ones(1), "scheduler": clock, "plan": plan}
        calls += [timeline.open(seen(step.noise_level, dtype, **given)) for _ in range(2)]
    assert source_of(timeline) == "scheduler"
    assert planned(calls) == [(0, step) for step in range(STEPS) for _ in range(2)]
    assert [call.branch for call in calls] == [0, 1] * STEPS
    assert [call.noise_level for call in calls[::2]] == [step.noise_level for step in plan.steps]


def test_in_half_precision_values_would_not_do() -> None:
    """What these tests rest on: some steps are told apart by no timestep."""
    levels = [step.noise_level for step in shifted(2048).steps]
    assert len({seen(level, torch.bfloat16).timestep.value for level in levels}) < 0.7 * STEPS


def test_once_proven_the_counter_needs_no_timestep() -> None:
    timeline, plan = Timeline(), plan_of(1.0, 0.8, 0.6, 0.4)
    clock = scheduler(plan)
    for index in (0, 1):
        clock.step_index = index
        timeline.open(arrival(plan.steps[index].timestep, shape=(1,), scheduler=clock, plan=plan))
    for index in (2, 3):
        clock.step_index = index
        call = timeline.open(unreadable(scheduler=clock, plan=plan))
        assert (call.step, call.noise_level) == (index, plan.steps[index].noise_level)
    assert timeline.reached == plan.steps[3].noise_level


@pytest.mark.parametrize("begins", ["begin_index", "timestep"])
def test_a_generation_may_enter_the_plan_in_the_middle(begins: str) -> None:
    """By what the pipeline has told the scheduler, or by where the first timestep stands."""
    timeline, plan = Timeline(), plan_of(1.0, 0.8, 0.6, 0.4)
    clock = scheduler(plan)
    clock.begin_index = 2 if begins == "begin_index" else None
    calls = []
    for index in (2, 3):
        clock.step_index = None if index == 2 else index
        level = plan.steps[index].timestep
        calls.append(timeline.open(arrival(level, scheduler=clock, plan=plan)))
    assert [(c.step, c.planned_step, c.is_last_step) for c in calls] == [
        (0, 2, False), (1, 3, True),
    ]  # fmt: skip


@every_dtype
@every_size
@pytest.mark.parametrize("names", [(None,), (None, None), ("cond",), ("cond", "uncond")])
@pytest.mark.parametrize("stuck_at", [None, 0])
def test_a_counter_that_stands_still_is_not_followed(
    stuck_at: int | None, names: tuple[str | None, ...], size: int, dtype: torch.dtype
) -> None:
    """A loop of one's own may use a scheduler for its timesteps alone."""
    timeline, plan, calls = Timeline(), shifted(size), []
    clock = scheduler(plan)
    clock.step_index = stuck_at
    for step in plan.steps:
        given: dict[str, Any] = {"latents": torch.ones(1), "scheduler": clock, "plan": plan}
        calls += [timeline.open(seen(step.noise_level, dtype, **given, name=n)) for n in names]
    assert planned(calls) == [(0, step) for step in range(STEPS) for _ in names]
    assert [call.branch for call in calls] == list(range(len(names))) * STEPS
    assert source_of(timeline) == "plan"


def test_a_counter_that_moves_after_all_is_followed_again() -> None:
    """Calls of one step may have latents of their own; in half precision that looks like steps."""
    timeline, plan, calls = Timeline(), shifted(2048), []
    clock = scheduler(plan)
    for index, step in enumerate(plan.steps):
        clock.step_index = index or None
        given = {"scheduler": clock, "plan": plan}
        calls += [timeline.open(seen(step.noise_level, torch.bfloat16, **given)) for _ in range(2)]
    assert planned(calls)[3:] == [(0, step) for step in range(STEPS) for _ in range(2)][3:]
    assert source_of(timeline) == "scheduler"


def test_a_counter_of_another_pipelines_steps_is_not_followed() -> None:
    timeline, plan = Timeline(), plan_of(1.0, 0.8, 0.6)
    clock = scheduler(plan)
    clock.step_index = 1
    calls = [timeline.open(arrival(level, scheduler=clock, plan=plan)) for level in (0.95, 0.3)]
    assert [(c.step, c.noise_level) for c in calls] == [(0, 0.95), (1, 0.3)]
    assert source_of(timeline) == "timesteps"


def test_of_several_stages_no_counter_is_read() -> None:
    """Only one stage of a pipeline calls the scheduler's step."""
    timeline, plan = Timeline(), plan_of(1.0, 0.8, 0.6)
    clock = scheduler(plan)
    clock.step_index = 0
    for step in plan.steps:
        call = timeline.open(arrival(step.timestep, scheduler=clock, plan=plan, stages=2))
    assert (call.step, source_of(timeline)) == (2, "plan")


def test_a_counter_that_goes_back_begins_a_generation() -> None:
    timeline, plan = Timeline(), plan_of(1.0, 0.8, 0.6)
    clock, calls = scheduler(plan), []
    for index in (0, 1, 0, 1):
        clock.step_index = index
        calls.append(timeline.open(arrival(plan.steps[index].timestep, scheduler=clock, plan=plan)))
    assert planned(calls) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_step_that_no_forward_pass_saw_is_missed_by_nobody() -> None:
    """Guidance may rest, and some loops call the model at every other step."""
    timeline, plan = Timeline(), plan_of(1.0, 0.8, 0.6, 0.4)
    clock, calls = scheduler(plan), []
    for index in (0, 2, 3):
        clock.step_index = index
        calls.append(timeline.open(arrival(plan.steps[index].timestep, scheduler=clock, plan=plan)))
    assert planned(calls) == [(0, 0), (0, 2), (0, 3)]
    assert calls[-1].is_last_step


# ---- what a pipeline says of its loop -----------------------------------------------------------


def test_steps_of_a_context_are_believed_without_a_scheduler() -> None:
    """Wan 2.2's second picture for one: a timestep a token, of which the first frame's are 0."""
    timeline, calls = Timeline(), []
    for _ in range(2):
        for step in range(3):
            for name in ("cond", "uncond"):
                calls.append(timeline.open(arrival(0.0, name=name, context_step=step)))
    assert source_of(timeline) == "cache_context"
    assert [(c.generation, c.step, c.branch) for c in calls] == [
        (generation, step, branch)
        for generation in range(2)
        for step in range(3)
        for branch in range(2)
    ]


def test_steps_of_a_context_find_their_place_in_the_plan() -> None:
    timeline, plan = Timeline(), plan_of(1.0, 0.8, 0.6, 0.4)
    calls = [
        timeline.open(arrival(plan.steps[2 + step].timestep, plan=plan, context_step=step))
        for step in range(2)
    ]
    assert source_of(timeline) == "cache_context"
    assert planned(calls) == [(0, 2), (0, 3)] and calls[-1].is_last_step


# ---- the plan, by count -------------------------------------------------------------------------


@every_dtype
@every_size
@pytest.mark.parametrize("names", [(None,), (None, None), ("cond", "uncond")])
def test_a_plan_is_followed_by_count_where_its_timesteps_are_rounded_alike(
    names: tuple[str | None, ...], size: int, dtype: torch.dtype
) -> None:
    timeline, plan, calls = Timeline(), shifted(size), []
    for step in plan.steps:
        latents = torch.ones(1)
        for name in names:
            given = {"latents": latents, "plan": plan, "name": name}
            calls.append(timeline.open(seen(step.noise_level, dtype, **given)))
    assert source_of(timeline) == "plan"
    assert planned(calls) == [(0, step) for step in range(STEPS) for _ in names]
    assert [call.branch for call in calls] == list(range(len(names))) * STEPS


def test_noise_levels_come_in_the_plans_precision() -> None:
    levels = tuple(torch.linspace(1.0, 1 / 28, 28, dtype=torch.float64).tolist())
    timeline, plan = Timeline(), plan_of(*levels)
    calls = [timeline.open(seen(level, torch.bfloat16, plan=plan)) for level in levels]
    assert calls[1].noise_level != seen(levels[1], torch.bfloat16).timestep.value
    assert tuple(call.noise_level for call in calls) == levels


def test_a_plan_is_used_only_while_it_is_followed() -> None:
    timeline, plan = Timeline(), plan_of(1.0, 0.8, 0.6, 0.4)
    levels = (1.0, 0.8, 0.7, 0.6)
    calls = [timeline.open(arrival(level, plan=plan)) for level in levels]
    assert [c.step for c in calls] == [0, 1, 2, 3] and calls[-1].generation == 0
    assert [c.noise_level for c in calls] == list(levels)
    assert source_of(timeline) == "timesteps" and not calls[-1].more_steps_follow


def test_a_plan_that_is_begun_again_begins_a_generation() -> None:
    timeline, plan = Timeline(), plan_of(1.0, 0.8, 0.6)
    calls = [timeline.open(arrival(level, plan=plan)) for level in (1.0, 0.8, 0.6, 1.0, 0.8)]
    assert planned(calls) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_two_equal_entries_of_whole_numbers_are_two_steps() -> None:
    """UniPC with much shift has 999 twice in int64."""
    timesteps = torch.tensor([999, 999, 998])
    timeline, plan = Timeline(), plan_of(*timesteps.tolist())
    calls = []
    for timestep in timesteps:
        latents = torch.ones(1)
        for name in ("cond", "uncond"):
            calls.append(
                timeline.open(
                    Arrival(
                        latents=latents,
                        read_timestep=lambda timestep=timestep: timestep,
                        noise_level_of=float,
                        plan=plan,
                        name=name,
                    )
                )
            )
    assert planned(calls) == [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (0, 2)]


# ---- values -------------------------------------------------------------------------------------


def test_without_anything_else_values_serve_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    timeline = Timeline()
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"):
        calls = [timeline.open(arrival(level)) for level in (1.0, 0.5, 1.0, 0.5)]
    assert [(c.generation, c.step) for c in calls] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert source_of(timeline) == "timesteps"
    (record,) = caplog.records
    assert "no scheduler has planned" in record.message and "scheduler=..." in record.message


def test_a_one_step_generation_is_over_when_other_latents_come_at_its_timestep() -> None:
    """Else a warm-up of one step would be the first step of the picture after it."""
    timeline = Timeline()
    calls = [timeline.open(arrival(level)) for level in (1.0, 1.0, 0.5)]
    assert [(c.generation, c.step, c.branch) for c in calls] == [(0, 0, 0), (1, 0, 0), (1, 1, 0)]


# ---- timesteps ----------------------------------------------------------------------------------


@every_dtype
@every_size
def test_every_timestep_that_a_model_sees_is_rounded_to_its_entry(
    size: int, dtype: torch.dtype
) -> None:
    for step in shifted(size).steps:
        timestep = seen(step.noise_level, dtype).timestep
        assert timestep.is_rounded(step.timestep)
        beyond = 3 * timestep.tolerance * step.timestep + 1e-4
        assert not timestep.is_rounded(step.timestep + beyond)


def test_whole_timesteps_are_exact() -> None:
    timestep = Timestep.of(torch.tensor(999))
    assert timestep.is_rounded(999) and not timestep.is_rounded(999.1)

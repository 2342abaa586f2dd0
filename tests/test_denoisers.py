"""Pipelines with several denoisers: one clock, one plan, a cache on each of them.

Two tiny FLUX in one pipeline, as Wan 2.2 has an expert for much noise and one for little; and a
pipeline that calls both at each step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from support.flux import Flux
from support.stack import EVER
from torch import nn

from diffusers_adapters.tiny.flux import tiny_flux
from xfuser_fastcache import (
    apply_cache_on_transformer,
    get_cache_statistics,
    get_cache_trace,
    remove_cache,
)
from xfuser_fastcache.apply import (
    apply_cache_on_pipeline,
    denoisers_of,
    remove_cache_from_pipeline,
)
from xfuser_fastcache.hooks import hook_on

STEPS, SWITCH = 14, 6
MASK = [1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class TwoExperts(DiffusionPipeline):
    """Denoises with one transformer down to a noise level, and with another one from there."""

    model_cpu_offload_seq = "transformer->transformer_2"

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, scheduler: Any):
        super().__init__()
        self.register_modules(
            transformer=transformer, transformer_2=transformer_2, scheduler=scheduler
        )

    def experts(self, index: int) -> list[Any]:
        """Return who is called at a step."""
        return [self.transformer if index < SWITCH else self.transformer_2]

    def __call__(
        self, names: tuple[str, ...] = ("cond", "uncond"), steps: int = STEPS
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 16, 16, generator=generator)
        texts = {name: torch.randn(1, 8, 32, generator=generator) for name in names}
        self.scheduler.set_timesteps(steps)
        self.scheduler.set_begin_index(0)
        for index, timestep in enumerate(self.scheduler.timesteps):
            velocity = torch.zeros(())
            for expert in self.experts(index):
                for name, text in texts.items():
                    with expert.cache_context(name):
                        velocity = (
                            velocity
                            + expert(
                                hidden_states=latents,
                                encoder_hidden_states=text,
                                pooled_projections=text[:, 0],
                                timestep=(timestep / 1000)[None],
                                img_ids=torch.zeros(16, 3),
                                txt_ids=torch.zeros(8, 3),
                                return_dict=False,
                            )[0]
                        )
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents


class Alternating(TwoExperts):
    """Calls both at each step."""

    def experts(self, index: int) -> list[Any]:
        return [self.transformer, self.transformer_2]


def pipeline(kind: type[TwoExperts] = TwoExperts) -> TwoExperts:
    one, two = (tiny_flux(seed, num_layers=1, num_single_layers=1)[0] for seed in (0, 1))
    return kind(one.transformer, two.transformer, FlowMatchEulerDiscreteScheduler())


def experts(pipe: TwoExperts) -> tuple[Any, Any]:
    return pipe.transformer, pipe.transformer_2


def decided(transformer: nn.Module, branch: int = 0) -> dict[int, str]:
    """Return step -> decision of a branch in the last generation."""
    rows = get_cache_trace(transformer)
    return {row["step"]: row["decision"] for row in rows if row["branch"] == branch}


def held(transformer: nn.Module) -> int:
    """Return how many anchors a transformer's cache holds."""
    branches = hook_on(transformer).engine.branches.values()
    return sum(
        len(memory.anchors)
        for local in branches
        for patches in local.memories.values()
        for memory in patches.values()
    )


def test_all_denoisers_of_a_pipeline_are_found() -> None:
    pipe = pipeline()
    found = denoisers_of(pipe)
    assert found == {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    assert apply_cache_on_pipeline(pipe) is pipe
    clocks = {id(hook_on(expert).engine.clock) for expert in experts(pipe)}
    assert len(clocks) == 1
    remove_cache_from_pipeline(pipe)
    assert [hook_on(expert) for expert in experts(pipe)] == [None, None]
    with pytest.raises(TypeError, match=re.escape("has no transformer to cache")):
        denoisers_of(object())


@pytest.mark.parametrize("together", [True, False], ids=["pipeline", "one by one"])
def test_one_mask_for_the_whole_schedule_is_followed_across_the_switch(together: bool) -> None:
    pipe = pipeline()
    if together:
        apply_cache_on_pipeline(pipe, steps_mask=MASK)
    else:
        for expert in experts(pipe):
            apply_cache_on_transformer(expert, steps_mask=MASK)
    first = pipe()
    one, two = experts(pipe)
    words = {step: "scheduled" if computed else "skipped" for step, computed in enumerate(MASK)}
    for branch in (0, 1):
        assert decided(one, branch) == {step: words[step] for step in range(SWITCH)}
        # Forecasts do not cross the switch: the second one's first step has no anchor.
        wanted = {step: words[step] for step in range(SWITCH, STEPS)} | {
            step: "forced" for step in range(SWITCH, 7)
        }
        assert decided(two, branch) == wanted
    for expert, count in ((one, SWITCH), (two, STEPS - SWITCH)):
        found = get_cache_statistics(expert)
        assert (found["generations"], found["steps"]) == (1, count)
        assert found["clock"] == "scheduler"
    assert torch.equal(pipe(), first)
    assert get_cache_statistics(two)["generations"] == 2


def test_a_mask_of_one_experts_steps_is_refused() -> None:
    pipe = apply_cache_on_pipeline(pipeline(), steps_mask=MASK[:SWITCH])
    with pytest.raises(ValueError, match="steps_mask has 6 entries, .* has 14 steps"):
        pipe()


@pytest.mark.parametrize(("forecaster", "history"), [("reuse", 1), ("taylor", 2)])
def test_a_second_experts_warm_up_is_as_short_as_its_history(forecaster: str, history: int) -> None:
    options = {"cache_ratio_threshold": EVER, "max_consecutive_skips": 99}
    pipe = apply_cache_on_pipeline(pipeline(), forecaster=forecaster, num_warmup_steps=4, **options)
    pipe()
    one, two = experts(pipe)
    # The step before the switch is no last step.
    assert decided(one) == {step: "forced" if step < 4 else "skipped" for step in range(SWITCH)}
    computed = [*range(SWITCH, SWITCH + history), STEPS - 1]
    assert decided(two) == {
        step: "forced" if step in computed else "skipped" for step in range(SWITCH, STEPS)
    }
    reasons = {row["step"]: row["reason"] for row in get_cache_trace(two)}
    assert (reasons[SWITCH], reasons[STEPS - 1]) == ("warm-up", "last step")


def test_at_the_switch_the_first_experts_anchors_are_freed_and_its_watchdog_rests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = apply_cache_on_pipeline(pipeline(), steps_mask=MASK)
    one, two = experts(pipe)
    seen: dict[int, tuple[int, int]] = {}
    expected: list[str | None] = [None]
    dog = hook_on(one).engine.watchdog
    monkeypatch.setattr(dog, "expect", lambda place: expected.__setitem__(0, place))
    monkeypatch.setattr(dog, "rest", lambda: expected.__setitem__(0, None))
    waits: dict[int, bool] = {}
    step = pipe.scheduler.step

    def spied(*args: Any, **kwargs: Any) -> Any:
        index = len(seen)
        seen[index] = held(one), held(two)
        waits[index] = expected[0] is not None
        return step(*args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", spied)
    pipe(names=("cond",))
    assert [one_holds > 0 for one_holds, _ in seen.values()] == [s < SWITCH for s in range(STEPS)]
    assert [two_holds > 0 for _, two_holds in seen.values()] == [s >= SWITCH for s in range(STEPS)]
    assert list(waits.values()) == [s < SWITCH for s in range(STEPS)]
    # What it held most counts all the same.
    assert get_cache_statistics(one)["cache_bytes"] > 0


def test_denoisers_that_take_turns_at_each_step_both_keep_their_anchors() -> None:
    pipe = apply_cache_on_pipeline(pipeline(Alternating), steps_mask=MASK)
    first = pipe()
    words = ["scheduled" if computed else "skipped" for computed in MASK]
    for expert in experts(pipe):
        for branch in (0, 1):
            assert list(decided(expert, branch).values()) == words
        assert held(expert) > 0
        assert get_cache_statistics(expert)["steps"] == STEPS
    assert torch.equal(pipe(), first)
    remove_cache_from_pipeline(pipe)
    assert not torch.equal(pipe(), first)


@pytest.mark.parametrize("kind", [TwoExperts, Alternating])
def test_threshold_zero_is_bit_identical_to_no_cache(kind: type[TwoExperts]) -> None:
    pipe = pipeline(kind)
    wanted = pipe()
    apply_cache_on_pipeline(pipe, cache_ratio_threshold=0)
    assert torch.equal(pipe(), wanted)


def test_a_cache_on_one_expert_alone_counts_the_whole_schedules_steps() -> None:
    pipe = pipeline()
    apply_cache_on_transformer(pipe.transformer_2, steps_mask=MASK)
    pipe(names=("cond",))
    words = {step: "scheduled" if MASK[step] else "skipped" for step in range(SWITCH, STEPS)}
    found = decided(pipe.transformer_2)
    assert [*found.values()] == ["forced", *list(words.values())[1:]]
    remove_cache(pipe.transformer_2)


def test_denoisers_of_two_pipelines_have_clocks_of_their_own() -> None:
    one, other = Flux().cache(), Flux(1).cache()
    assert one.engine.clock is not other.engine.clock

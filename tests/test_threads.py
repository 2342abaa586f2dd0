"""Threads that share a cached transformer: who begins last keeps it, and nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.flux import STEPS
from support.loops import LEVELS, Branch, begin, cached, denoise, same
from support.stack import EVER
from support.turns import Pipeline, take_turns

from xfuser_fastcache import apply_cache_on_transformer, get_cache_trace
from xfuser_fastcache.clock.ownership import TransformerInUse

every_model = pytest.mark.parametrize("model", ["flux", "sd3", "pixart"])
named_or_not = pytest.mark.parametrize("named", [False, True], ids=["by order", "by name"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def sharing(model: str, **options: Any) -> list[Pipeline]:
    """Return two pipelines with one cached transformer and their own prompts and schedulers.

    The cache was given the first one's scheduler, and finds both.
    """
    pipes = [Pipeline(model).cache(**options), Pipeline(model, seed=1)]
    pipes[1].pipe.transformer = pipes[1].transformer = pipes[0].transformer
    return pipes


@every_model
@pytest.mark.parametrize("given", ["A", "B"])
@pytest.mark.parametrize("head_start", [0, 3])
def test_who_begins_last_keeps_a_shared_transformer(
    model: str, given: str, head_start: int
) -> None:
    """Whoever's scheduler was given, and whether A is ahead of B or not."""
    a, b = sharing(model) if given == "A" else reversed(sharing(model))
    _, wanted_b, wanted_a = a(), b(), a()
    steps = []

    def work(hand_on: Callable[[], None]) -> torch.Tensor:
        def after_step() -> None:
            steps.append(1)
            if len(steps) > head_start:
                hand_on()

        return a.stepwise(after_step)

    error, image = take_turns(work, b.stepwise)
    assert isinstance(error, TransformerInUse) and isinstance(error, RuntimeError)
    assert "thread 'A' goes on with" in str(error)
    assert "serves the generation of thread 'B'" in str(error)
    assert "run one generation at a time" in str(error)
    assert len(steps) == head_start + 1
    assert torch.equal(image, wanted_b)
    # Both draw again, from this thread.
    assert torch.equal(a(), wanted_a) and torch.equal(b(), wanted_b)


@every_model
@pytest.mark.parametrize("given", ["A", "B"])
def test_a_thread_that_lost_its_generation_may_begin_another(model: str, given: str) -> None:
    a, b = sharing(model) if given == "A" else reversed(sharing(model))
    wanted = [a(), b(), a()][2]

    def work(hand_on: Callable[[], None]) -> Any:
        with pytest.raises(TransformerInUse):
            a.stepwise(hand_on)
        return a()

    image, error = take_turns(work, b.stepwise)
    assert torch.equal(image, wanted)
    assert "thread 'B' goes on with" in str(error)
    assert "serves the generation of thread 'A'" in str(error)


def test_a_lost_generation_is_refused_also_when_the_one_that_took_over_failed() -> None:
    a, b = sharing("flux")

    def fails(_: Any) -> torch.Tensor:
        def fail(*_: Any) -> None:
            raise ValueError("out of luck")

        handle = a.transformer.norm_out.register_forward_pre_hook(fail)
        try:
            return b()
        finally:
            handle.remove()

    lost, failed = take_turns(a.stepwise, fails)
    assert isinstance(lost, TransformerInUse) and isinstance(failed, ValueError)


@every_model
@pytest.mark.parametrize(
    ("scheduler", "interrupted_after"), [(True, 1), (True, 3), (True, STEPS), (False, 3)]
)
def test_each_request_may_come_in_another_thread(
    model: str, interrupted_after: int, scheduler: bool
) -> None:
    pipe = Pipeline(model)
    options = {"scheduler": pipe.pipe.scheduler} if scheduler else {"num_steps": STEPS}
    apply_cache_on_transformer(pipe.transformer, cache_ratio_threshold=EVER, **options)
    wanted, steps = pipe(), []

    def interrupt() -> None:
        steps.append(1)
        if len(steps) == interrupted_after:
            raise KeyError("the client is gone")

    def first(hand_on: Callable[[], None]) -> torch.Tensor:
        with pytest.raises(KeyError):
            pipe.stepwise(interrupt)
        hand_on()
        return pipe()

    assert same(take_turns(first, lambda _: pipe()), [wanted, wanted])


def test_a_second_thread_inside_a_forward_is_refused_and_the_first_goes_on() -> None:
    a, b = sharing("flux")
    wanted = a()
    refused = []

    def intrude(*_: Any) -> None:
        """Start B in the midst of a block of A's."""
        if threading.current_thread().name != "A" or not stand[0]:
            return
        stand[0] -= 1

        def work() -> None:
            try:
                b()
            except TransformerInUse as error:
                refused.append(str(error))

        thread = threading.Thread(target=work, name="B")
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()

    stand, wanted_b = [3 * STEPS], b()
    a.transformer.transformer_blocks[1].attn.register_forward_pre_hook(intrude)
    (image,) = take_turns(lambda _: a())
    assert torch.equal(image, wanted)
    # A computed 4 of its 8 steps.
    assert len(refused) == STEPS // 2
    assert all("thread 'B' called" in words for words in refused)
    assert all("a forward pass of thread 'A' at this moment" in words for words in refused)
    assert torch.equal(b(), wanted_b)


def test_a_step_from_another_thread_is_refused_where_the_plan_goes_on() -> None:
    """The plan shows that a generation is not at its end, and falling noise that this goes on."""
    transformer, branch = cached(), Branch(0)
    alone = denoise(transformer, branch)[0]
    begin(branch)
    for step in LEVELS[:2]:
        branch.step(transformer, step, named=False)

    def work(_: Any) -> None:
        other = Branch(1)
        other.start()
        other.step(transformer, LEVELS[2], named=False)

    (error,) = take_turns(work)
    assert isinstance(error, TransformerInUse)
    for step in LEVELS[2:]:
        branch.step(transformer, step, named=False)
    assert same(branch.outputs, alone)


@named_or_not
def test_a_generation_lost_between_two_calls_of_a_step_is_refused_at_the_second(
    named: bool,
) -> None:
    transformer, one, other = cached(num_warmup_steps=0), Branch(0), Branch(1)
    wanted = denoise(transformer, other)[0]
    begin(one)

    def work(hand_on: Callable[[], None]) -> None:
        one.step(transformer, 1.0, named)
        hand_on()
        one.step(transformer, 1.0, named)

    def takes_over(hand_on: Callable[[], None]) -> None:
        begin(other)
        for level in LEVELS:
            other.step(transformer, level, named)
            hand_on()

    error, nothing = take_turns(work, takes_over)
    assert isinstance(error, TransformerInUse) and nothing is None
    assert same(other.outputs, wanted)


def test_a_name_given_in_another_thread_is_not_this_ones() -> None:
    transformer, branch = cached(), Branch(0)

    def other(_: Any) -> None:
        with transformer.cache_context("uncond"):
            pass

    begin(branch)
    with transformer.cache_context(branch.name):
        take_turns(other)
        branch.step(transformer, LEVELS[0], named=False)
    branch.step(transformer, LEVELS[1], named=True)
    # Else the first of them would be a branch without a name.
    trace = get_cache_trace(transformer)
    assert [(row["step"], row["branch"]) for row in trace] == [(0, 0), (1, 0)]

"""Generations that take turns: pipelines that stop after every step, threads in alternation."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from diffusers_adapters.tiny import TINY_PIPELINES
from support.flux import STEPS
from support.stack import EVER
from xfuser_fastcache import apply_cache_on_transformer


class Pipeline:
    """A diffusers pipeline that repeats its generation."""

    def __init__(self, model: str, seed: int = 0):
        self.pipe, self.call = TINY_PIPELINES[model](seed)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer

    def cache(self, **options: Any) -> Pipeline:
        options = {"cache_ratio_threshold": EVER, **options}
        apply_cache_on_transformer(self.transformer, scheduler=self.pipe.scheduler, **options)
        return self

    def __call__(self, **changes: Any) -> torch.Tensor:
        noise = torch.Generator().manual_seed(1)
        call = {**self.call, "num_inference_steps": STEPS, "generator": noise, **changes}
        return self.pipe(**call).images

    def stepwise(self, after_step: Callable[[], None]) -> torch.Tensor:
        """Generate; `after_step` is called after every step of the scheduler."""
        scheduler = self.pipe.scheduler

        @functools.wraps(scheduler.step)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = type(scheduler).step(scheduler, *args, **kwargs)
            after_step()
            return result

        scheduler.step = step
        try:
            return self()
        finally:
            del scheduler.step


def take_turns(*works: Callable[[Callable[[], None]], Any]) -> list[Any]:
    """Run each work in a thread of its own, one at a time, in strict alternation.

    Args:
        *works: called with a function that hands the turn to the next one that is not done.

    Returns:
        What each returned, or the error that ended it.
    """
    turns = [threading.Semaphore(0) for _ in works]
    results: list[Any] = [None] * len(works)
    done: set[int] = set()

    def hand_on(index: int) -> None:
        for other in [*range(index + 1, len(works)), *range(index + 1)]:
            if other not in done:
                turns[other].release()
                return

    def wait(index: int) -> None:
        assert turns[index].acquire(timeout=20)

    def turn(index: int) -> None:
        hand_on(index)
        wait(index)

    def run(index: int) -> None:
        wait(index)
        try:
            with torch.no_grad():
                results[index] = works[index](lambda: turn(index))
        except Exception as error:
            results[index] = error
        done.add(index)
        hand_on(index)

    names = "ABC"
    threads = [
        threading.Thread(target=run, args=(i,), name=names[i], daemon=True)
        for i in range(len(works))
    ]
    for thread in threads:
        thread.start()
    turns[0].release()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    return results

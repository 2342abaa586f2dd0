"""Few steps: a warning, once, where nothing is skipped, that says what to set; else none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache

OFTEN = {"cache_ratio_threshold": 12.0}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def drawing() -> tuple[Any, dict[str, Any]]:
    pipe, call = TINY_PIPELINES["flux2"]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def warned(
    drawing: tuple[Any, dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    steps: int,
    generations: int = 1,
    **options: Any,
) -> tuple[list[str], float]:
    """Return what a cached run warns of, and the share of blocks that it skips."""
    pipe, call = drawing
    apply_cache_on_transformer(pipe.transformer, scheduler=pipe.scheduler, **options)
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"):
        for _ in range(generations):
            pipe(**{**call, "num_inference_steps": steps})
    hits = get_cache_statistics(pipe.transformer)["block_approx_ratio"]
    remove_cache(pipe.transformer)
    return [record.getMessage() for record in caplog.records], hits


@pytest.mark.parametrize(
    ("steps", "options", "why"),
    [
        (3, OFTEN, "the first 2 are computed (num_warmup_steps=2), and so is the last one"),
        (4, {"use_cache": "TaylorSeer"}, "the first 3 are computed (num_warmup_steps=3)"),
        (9, {**OFTEN, "num_warmup_steps": 8}, "the first 8 are computed (num_warmup_steps=8)"),
        (4, {"computed_steps": 5}, "computed_steps=5 computes all of them"),
    ],
)
def test_steps_that_leave_nothing_to_skip_are_told_as_they_begin(
    drawing: Any, caplog: pytest.LogCaptureFixture, steps: int, options: dict[str, Any], why: str
) -> None:
    (message,), hits = warned(drawing, caplog, steps, generations=2, **options)
    assert hits == 0
    assert message.startswith(f"Nothing will be skipped in {steps} steps: ") and why in message
    assert f"give computed_steps={steps - 1}," in message
    # And what it says is allowed, and skips.
    caplog.clear()
    messages, hits = warned(drawing, caplog, steps, computed_steps=steps - 1)
    assert (messages, hits) == ([], pytest.approx(1 / steps))


def test_changes_that_are_all_too_large_are_told_at_the_end_with_their_reasons(
    drawing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (message,), hits = warned(drawing, caplog, 4, generations=2, cache_ratio_threshold=1e-6)
    assert hits == 0
    assert message.startswith("Nothing was skipped in 4 steps (warm-up 2, changed 1, last step 1).")


@pytest.mark.parametrize(
    "options",
    [
        OFTEN,
        {"cache_ratio_threshold": 0},
        {"steps_mask": [1, 1, 1, 1]},
        {"enable_block_approx": False, "motion_threshold": 0.3},
        {"computed_steps": 3},
    ],
)
def test_nothing_is_said_where_it_skips_or_was_told_not_to(
    drawing: Any, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    messages, hits = warned(drawing, caplog, 4, **options)
    assert not messages
    assert (hits > 0) == (options is OFTEN or "computed_steps" in options)


def test_each_number_of_steps_is_told_once_and_one_step_never(
    drawing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As a program warms up by one or two steps, and then draws with more."""
    pipe, call = drawing
    apply_cache_on_transformer(pipe.transformer, scheduler=pipe.scheduler, **OFTEN)
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"):
        for steps in (1, 2, 3, 4, 3, 2, 1):
            pipe(**{**call, "num_inference_steps": steps})
    remove_cache(pipe.transformer)
    told = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in told] == [
        "Nothing will be skipped in 2 steps",
        "Nothing will be skipped in 3 steps",
    ]
    assert "leave the cache out" in told[0] and "computed_steps" not in told[0]

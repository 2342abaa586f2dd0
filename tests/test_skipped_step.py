"""A skipped step under sequence parallelism communicates what no rank can make by itself.

Layers: `gloo` (one world of two ranks).
"""

from __future__ import annotations

from typing import Any

import pytest
from support.worlds import run_world

STEPS = 8


@pytest.fixture(scope="module")
def world() -> dict[int, dict[str, Any]]:
    return run_world("skipped_worker.py", 2)


@pytest.mark.gloo
@pytest.mark.parametrize("forecaster", ["taylor", "output"])
def test_a_rank_that_is_given_its_share_forecasts_it_alone(
    world: dict[int, dict[str, Any]], forecaster: str
) -> None:
    for rank in world.values():
        found = rank["flux"][forecaster]
        assert found["skipped"] == [{}] * 4
        # The last step is followed by a gather of the latents.
        assert all(step for step in found["computed"])
        assert found["vectors"] == STEPS


@pytest.mark.gloo
def test_a_transformer_that_gathers_does_so_with_the_noise_alone(
    world: dict[int, dict[str, Any]],
) -> None:
    """Each rank goes on with all latents and knows its own tokens alone: one gather."""
    for rank in world.values():
        skipped = rank["flux-kontext"]["taylor"]["skipped"]
        (gathered,) = {tuple(step.items()) for step in map(_hashable, skipped)}
        ((_, sizes),) = gathered
        assert len(sizes) == 1
        # 64 tokens of noise and 32 of the picture that is edited, 64 channels each.
        assert sizes[0] == 96 * 64


@pytest.mark.gloo
def test_where_the_forward_is_stood_in_for_nothing_is_cut_nor_gathered(
    world: dict[int, dict[str, Any]],
) -> None:
    for rank in world.values():
        found = rank["flux-kontext"]["output"]
        assert found["skipped"] == [{}] * 4
        assert all(step for step in found["computed"])


def _hashable(step: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sizes) for name, sizes in step.items()}

"""FSDP shares weights, so ranks that share them decide together: the group, and real worlds.

All on the host: FSDP2 runs there over gloo, FSDP1 with the host in the place of its accelerator.
Neither was run on a GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.worlds import run_world
from torch import nn

from xfuser_fastcache.models.wrappers import unwrapped
from xfuser_fastcache.xdit.groups import deciding_ranks

AXES = ("tp", "sp", "pp", "cfg", "dp")
SIZES = range(1, 17)


@pytest.fixture(scope="module")
def generator() -> Any:
    """xfuser's own arithmetic of groups, without all else that importing xfuser brings along."""
    package = importlib.util.find_spec("xfuser")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0], "core", "distributed", "utils.py")
    return runpy.run_path(str(path))["RankGenerator"]


def degrees() -> Iterator[dict[str, int]]:
    """Every combination of degrees up to 16 ranks that xfuser's own checks let through."""
    for sizes in itertools.product(SIZES, SIZES, SIZES, (1, 2), SIZES):
        found = dict(zip(AXES, sizes, strict=True))
        world = sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizes[4]
        if world <= 16:
            for sharded in range(1, world + 1 if found["tp"] == 1 else 2):
                if world % sharded == 0:
                    yield {**found, "fs": sharded}


def connected(groups: list[list[int]], rank: int) -> tuple[int, ...]:
    """Return all ranks that are reached from one by groups that have a rank in common."""
    reached, grown = {rank}, {rank}
    while grown:
        grown = set().union(*(g for g in groups if reached.intersection(g))) - reached
        reached |= grown
    return tuple(sorted(reached))


def test_the_decision_group_is_all_that_share_a_collective(generator: Any) -> None:
    seen = set()
    for sizes in degrees():
        ranks = generator(**sizes, order="tp-sp-pp-cfg-dp")
        groups = [g for axis in AXES if axis != "dp" for g in ranks.get_ranks(axis)]
        groups += ranks.get_ranks("tp-sp-pp-cfg")
        groups += ranks.get_ranks("fs", independent_ranks=True)
        replica = len(ranks.get_ranks("tp-sp-pp-cfg")[0])
        for rank in range(ranks.world_size):
            found = deciding_ranks(rank, replica, sizes["fs"])
            assert found == connected(groups, rank), (sizes, rank)
        seen.add((replica, sizes["fs"], len(found)))
    # Weights shared within replicas, by whole ones, and over their borders.
    assert {(4, 2, 4), (2, 4, 4), (4, 6, 12), (1, 16, 16), (8, 1, 8)} <= seen


class Shell(nn.Module):
    """A wrapper, as FSDP1's and torch.compile's are."""

    def __init__(self, name: str, inner: nn.Module):
        super().__init__()
        self.add_module(name, inner)


def test_wrappers_are_looked_through_in_any_order() -> None:
    inner = nn.Linear(2, 2)
    assert unwrapped(inner) is inner
    assert unwrapped(torch.compile(inner, backend="eager")) is inner
    shell = Shell("_fsdp_wrapped_module", inner)
    assert unwrapped(shell) is inner
    assert unwrapped(torch.compile(shell, backend="eager")) is inner
    other = Shell("module", inner)
    assert unwrapped(other) is other


@pytest.mark.gloo
def test_replicas_that_share_weights_decide_together() -> None:
    """Bit for bit the same decisions for two prompts, and pictures as before once it is removed."""
    ranks = run_world("fsdp_worker.py", 2, "replicas", timeout_s=200)
    assert [ranks[r]["replica"] for r in (0, 1)] == [0, 1]
    assert ranks[0]["group"] == ranks[1]["group"] == [0, 1]
    assert ranks[0]["decisions"] == ranks[1]["decisions"]
    assert ranks[0]["latents"] != ranks[1]["latents"]
    for found in ranks.values():
        assert 0 < found["hits"] < 1
        assert found["latents"] != found["whole"] == found["uncached"] == found["removed"]


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2"])
def test_cut_weights_change_no_bit_and_skipped_blocks_gather_none(
    kind: str, tmp_path: Path
) -> None:
    ranks = run_world("fsdp_worker.py", 2, "kinds", kind, str(tmp_path), timeout_s=280)
    for found in ranks.values():
        assert found["uncached"] and found["removed"] and found["left"]
        gathers = found["gathers"]
        assert gathers["never"] == gathers["uncached"]
        for name in ("Fast", "Tea", "Fb", "output", "calibrated"):
            assert found[name]["same"], name
            assert found[name]["costs"], name
            assert found[name]["hits"] > 0, name
            assert gathers[name] < gathers["uncached"], name

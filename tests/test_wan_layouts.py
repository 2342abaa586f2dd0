"""Every version of Wan in every layout of xDiT, 20 steps by a mask, as real ranks over gloo.

With tokens that divide by the ranks and with 27 that do not; two experts through their boundary.
"""

from __future__ import annotations

from typing import Any

import pytest
import wan_worker
from support.worlds import run_world

from diffusers_adapters.tiny import TINY_MODELS
from xfuser_fastcache.benchmarks.layouts import LAYOUTS, ONE_RANK
from xfuser_fastcache.chaos.families import runs_in

WAN = [name for name, tiny in TINY_MODELS.items() if tiny.adapter in ("wan", "wan_vace")]
ULYSSES, RING, CFG = "--ulysses_degree=2", "--ring_degree=2", "--use_cfg_parallel"
WORLDS: dict[str, tuple[int, tuple[str, ...]]] = {
    ONE_RANK: (1, ()),
    **{name: LAYOUTS[name] for name in ("ulysses 2", "ring 2", "cfg 2", "data 2")},
    "ulysses 2 x ring 2": (4, (ULYSSES, RING)),
    "cfg 2 x ulysses 2": (4, (CFG, ULYSSES)),
    "cfg 2 x ring 2": (4, (CFG, RING)),
}
CASES = [
    (at, name, size)
    for at, (_, flags) in WORLDS.items()
    for name in WAN
    if runs_in(name, flags)
    for size in wan_worker.SIZES
]
_worlds: dict[str, list[dict[str, Any]]] = {}
SWITCH = 7  # of 20 steps, with a boundary of .875


def ranks_of(at: str) -> list[dict[str, Any]]:
    """Run a layout's world once; return what each rank reports."""
    if at not in _worlds:
        count, flags = WORLDS[at]
        models = [name for name in WAN if runs_in(name, flags)]
        world = run_world("wan_worker.py", count, "--models", *models, *flags, timeout_s=900)
        _worlds[at] = [world[rank]["found"] for rank in sorted(world)]
    return _worlds[at]


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(("at", "name", "size"), CASES, ids=str)
def test_every_version_of_wan_holds_its_promise_in_every_layout(
    at: str, name: str, size: int
) -> None:
    ranks = [found[f"{name}, {size}"] for found in ranks_of(at)]
    by_group: dict[tuple[int, ...], set[str]] = {}
    for found in ranks:
        for promise in ("exact", "repeats", "finite", "changed", "restored"):
            assert found[promise], promise
        assert (found["collectives"], found["recomputed"], found["said"]) == (1, 0, [])
        by_group.setdefault(tuple(found["group"]), set()).add(found["digest"])
    assert all(len(digests) == 1 for digests in by_group.values())
    assert len(by_group) == (2 if "data" in at else 1)
    # A step's two branches are two calls, or one where ranks share them out.
    steps, words = ranks[0]["steps"], ranks[0]["decided"]
    assert sum(steps) == 2 * wan_worker.STEPS
    skipped = {int(step) for step, word in words.items() if word == "skipped"}
    wanted = {step for step in range(wan_worker.STEPS) if not wan_worker.MASK[step]}
    if not name.startswith("wan22"):
        assert skipped == wanted
        return
    # Steps count through; no forecast crosses the boundary, and nothing else is computed.
    assert steps == [2 * SWITCH, 2 * (wan_worker.STEPS - SWITCH)]
    assert skipped == wanted - {SWITCH}
    # The first expert's anchors are freed, and its watchdog rests, for longer than it has patience.
    held = ranks[0]["first_holds"]
    assert len(held) * wan_worker.PAUSE_S > wan_worker.PATIENCE_S and not any(held)


# Replicas draw a batch of two, of other embeddings; and under ring attention the padding of tokens
# that do not divide is seen (docs/limits.md).
ALIKE = [c for c in CASES if "data" not in c[0] and not ("ring" in c[0] and c[2] == 48)]


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(("at", "name", "size"), ALIKE, ids=str)
def test_uncached_a_layout_draws_what_one_rank_draws(at: str, name: str, size: int) -> None:
    alone = ranks_of(ONE_RANK)[0][f"{name}, {size}"]["control"]
    for found in ranks_of(at):
        assert found[f"{name}, {size}"]["control"] == pytest.approx(alone, rel=1e-6)

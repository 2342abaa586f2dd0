"""Fault worlds: real ranks with one fault each; `fastcache chaos --worlds` draws them at random."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import pytest

from diffusers_adapters.registry import adapters
from diffusers_adapters.tiny import TINY_MODELS
from xfuser_fastcache.chaos import worlds
from xfuser_fastcache.chaos.families import LAYOUTS
from xfuser_fastcache.chaos.faults import CACHES, FAULTS, LIMIT_S, World

ERROR = "named error, then right picture"
FINE = "right picture"
OFTEN, SPANS, MASK, _, NEVER = CACHES


def world(fault: str, family: str, layout: str, rank: int, **options: Any) -> World:
    return World(
        seed=0,
        family=family,
        layout=layout,
        fault=fault,
        rank=rank,
        step=2,
        block=0.5,
        options={**OFTEN, "verify_consensus": False, "sync_timeout_s": LIMIT_S, **options},
    )


@pytest.fixture(scope="module")
def apart() -> Iterator[Executor]:
    """A process of its own, since other tests fork ranks from another server than worlds do."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.gloo
@pytest.mark.chaos
@pytest.mark.parametrize(
    ("drawn", "ending"),
    [
        # Their sizes would end the process inside gloo: found before anything else is sent, also
        # where refiners attend ahead of the blocks.
        (world("other size", "z-image", "ulysses 2", 1), ERROR),
        # It leaves xfuser another table of positions.
        (world("other size", "pixart", "ring 2", 0), ERROR),
        (world("other batch", "qwen-edit", "cfg 2", 0, **MASK), ERROR),
        (world("other steps", "hunyuan-video", "ring 2", 1, **MASK), ERROR),
        (world("other size", "sd3", "pipefusion 2", 1), ERROR),
        (world("other seed", "wan", "ulysses 2", 0, verify_consensus=True), ERROR),
        # The first stage waits for the last one no longer than the limit.
        (world("stopped beyond the limit", "pixart", "pipefusion 2", 1, **NEVER), ERROR),
        # Messages stay between the stages.
        (world("exception in a callback on all ranks", "flux", "pipefusion 2", 0), ERROR),
        # A wait inside attention passes its limit, which breaks xfuser's own group.
        (world("exception in a block", "wan-i2v", "ulysses 2", 1, **SPANS), ERROR),
        # On both denoisers.
        (world("cache applied twice", "wan22", "ring 2", 0), FINE),
        (world("killed", "pixart", "pipefusion 2", 1), "named error, one rank killed"),
        # With those above, every fault.
        (world("NaN", "flux2", "pipefusion 2", 0), FINE),
        (world("infinity", "sd3", "data 2", 1), FINE),
        (world("other config", "flux", "ulysses 2", 1), ERROR),
        (world("other mask", "sd3", "cfg 2", 0, **MASK), ERROR),
        (world("other embeddings", "wan-i2v", "cfg 2", 1, verify_consensus=True), ERROR),
        (world("slow rank", "pixart", "cfg 2", 1), FINE),
        (world("stopped below the limit", "sd3", "data 2", 0), FINE),
        (world("exception in a callback on one rank", "flux", "data 2", 1), ERROR),
        (world("cache removed", "cogvideox", "cfg 2", 0), ERROR),
    ],
    ids=str,
)
def test_a_world_ends_in_time_as_it_should(apart: Executor, drawn: World, ending: str) -> None:
    verdict = apart.submit(worlds.verdict_of, drawn).result()
    assert verdict.held, f"{verdict.ending}: {verdict.detail}"
    assert verdict.ending == ending, verdict.detail


def test_a_seed_draws_the_same_world_again_and_seeds_draw_them_all() -> None:
    drawn = [World.of(seed) for seed in range(400)]
    assert drawn == [World.of(seed) for seed in range(400)]
    assert {w.family for w in drawn} == set(TINY_MODELS)
    assert {w.fault for w in drawn} == set(FAULTS)
    drawn += [World.of(seed) for seed in range(400, 12000)]
    assert {(w.layout, w.family) for w in drawn} == {
        (layout, family) for layout, (_, _, families) in LAYOUTS.items() for family in families
    }
    assert all(0 <= w.rank < w.ranks for w in drawn)
    one_a_call = [w for w in drawn if TINY_MODELS[w.family].alone]
    assert one_a_call and not [w for w in one_a_call if w.fault == "other batch"]


def test_every_registered_family_is_drawn_where_xdit_runs_it() -> None:
    """A family joins by its adapter and its tiny pipeline; nothing names it here."""
    drawn = {family for _, _, families in LAYOUTS.values() for family in families}
    assert {TINY_MODELS[family].adapter for family in drawn} == set(adapters())
    in_pipelines = LAYOUTS["pipefusion 4"][2]
    assert "flux2" in in_pipelines and "klein" not in in_pipelines  # xDiT drops its second branch
    assert "krea2" not in LAYOUTS["ulysses 2 x ring 2"][2]  # its runner offers no ring attention
    shared = LAYOUTS["cfg 2"][2]
    assert (
        "wan-i2v" in shared and "wan" not in shared
    )  # xDiT shares out guidance of the first alone


def phase(**found: Any) -> worlds._Phase:
    return worlds._Phase(**found)


class Told:
    """Ranks that end each phase as they are told."""

    def __init__(self, **phases: worlds._Phase):
        self.phases = {"ready": phase(), **phases}

    def run(self, name: str, *_: float) -> worlds._Phase:
        return self.phases[name]


RIGHT = {0: ("a", ""), 1: ("b", "")}
EACH_OTHER = {0: "rank 1 is late", 1: "rank 0 is late"}
TWO = world("other size", "flux", "ulysses 2", 1)


@pytest.mark.parametrize(
    ("fault", "recovery", "ending"),
    [
        (phase(pictures={0: ("a", "")}, hung=[1]), phase(), "hang"),
        (phase(hung=[0], died={1: -6}), phase(), "abort"),
        (phase(pictures={0: ("a", ""), 1: ("c", "")}), phase(), "wrong picture"),
        (phase(pictures={0: ("a", "")}, errors={1: "gloo: timed out"}), phase(), "unnamed error"),
        (phase(pictures={0: ("a", "")}, errors={1: "rank 1 waited"}), phase(), "unnamed error"),
        (phase(errors=EACH_OTHER), phase(hung=[0]), "hang or abort after"),
        (phase(errors=EACH_OTHER), phase(errors={0: "x"}), "no recovery"),
        (
            phase(errors=EACH_OTHER),
            phase(pictures={0: ("a", ""), 1: ("c", "")}),
            "wrong picture after recovery",
        ),
    ],
)
def test_what_gets_through_is_seen(
    fault: worlds._Phase, recovery: worlds._Phase, ending: str
) -> None:
    ranks: Any = Told(reference=phase(pictures=RIGHT), fault=fault, recovery=recovery)
    held, found, _ = worlds._judged(TWO, ranks, True)
    assert not held
    assert found.startswith(ending)


def test_ranks_that_decide_differently_are_seen() -> None:
    drawn = world("NaN", "flux", "ulysses 2", 1)
    parted = phase(pictures={0: ("c", "decisions"), 1: ("d", "other ones")})
    ranks: Any = Told(reference=phase(pictures=RIGHT), fault=parted)
    assert worlds._judged(drawn, ranks, True)[:2] == (False, "ranks decided differently")

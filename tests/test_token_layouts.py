"""Token plans under xDiT's layouts, on real ranks: equal counts, equal decisions, no hang."""

from __future__ import annotations

from typing import Any

import pytest
from support.matrix import STEPS
from support.worlds import run_world
from tokens_worker import PLANS, plans_of

TOGETHER = {
    "1 rank": (1, "flux", "sd3", "pixart"),
    "ulysses": (2, "flux", "sd3", "pixart", "--ulysses_degree=2"),
    "ulysses, two attentions a block": (2, "sd3.5", "--ulysses_degree=2"),
    "ring": (2, "flux", "sd3", "pixart", "--ring_degree=2"),
    "cfg": (2, "sd3", "pixart", "--use_cfg_parallel"),
}
QUICK = ("ulysses",)
HALF = 0.5 * (STEPS - 3) / STEPS
_worlds: dict[str, list[dict[str, Any]]] = {}


def world(layout: str) -> list[dict[str, Any]]:
    if layout not in _worlds:
        ranks, *words = TOGETHER[layout]
        models = [str(word) for word in words if not str(word).startswith("--")]
        flags = [str(word) for word in words if str(word).startswith("--")]
        flags += ["--in_turn"] * (layout in QUICK)
        found = run_world("tokens_worker.py", int(ranks), "--model", *models, *flags, timeout_s=400)
        _worlds[layout] = [found[rank] for rank in sorted(found)]
    return _worlds[layout]


CELLS = [
    (layout, str(model))
    for layout, (_, *words) in TOGETHER.items()
    for model in words
    if not str(model).startswith("--")
]


def in_turn(cells: list[tuple[str, str]]) -> list[Any]:
    """Cells as parameters; those of other worlds than the quick ones are slow."""
    return [
        pytest.param(*cell, marks=() if cell[0] in QUICK else pytest.mark.slow) for cell in cells
    ]


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("layout", "model", "plan"),
    [
        pytest.param(layout, model, plan, marks=() if layout in QUICK else pytest.mark.slow)
        for layout, model in CELLS
        for plan in plans_of(TOGETHER[layout].index(model) - 1, layout in QUICK)
    ],
)
def test_a_token_plan_runs_and_its_ranks_agree(layout: str, model: str, plan: str) -> None:
    found = [rank["models"][model][plan] for rank in world(layout)]
    assert all(f["repeats"] and f["finite"] for f in found)
    assert all(f["collectives"] == 1 for f in found)
    assert len({f["digest"] for f in found}) == 1
    assert len({f["spatial"] for f in found}) == 1
    for f in found:
        if plan == "all move":
            assert f["exact"] and f["spatial"] == 0
        elif plan != "adaptive":
            # The first two steps and the last are computed with all tokens.
            assert 0.05 < f["spatial"] and f["spatial"] + f["blocks"] < 7 / 8
            assert not (f["exact"] and f["has_output"])
        assert (f["blocks"] > 0) == ("cache_ratio_threshold" in PLANS[plan])


@pytest.mark.gloo
@pytest.mark.parametrize(("layout", "model"), in_turn(CELLS))
def test_nothing_of_a_token_plan_stays(layout: str, model: str) -> None:
    assert all(rank["models"][model]["restored"] for rank in world(layout))


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("layout", "model"), in_turn([c for c in CELLS if c[0] not in ("1 rank", "cfg")])
)
def test_a_still_rank_computes_as_many_tokens_as_one_that_moves(layout: str, model: str) -> None:
    found = [ratio for rank in world(layout) for ratio in rank["models"][model]["uneven"]]
    # Half of one rank's tokens move, none of the other's: half run at all steps but three.
    assert found == [pytest.approx(HALF, abs=0.1)] * 4


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("layout", "model"),
    in_turn([c for c in CELLS if c[0] != "1 rank" and c[1] in TOGETHER["1 rank"]]),
)
def test_maps_of_static_tokens_give_two_ranks_what_they_give_one(layout: str, model: str) -> None:
    alone = world("1 rank")[0]["models"][model]
    for rank in world(layout):
        found = rank["models"][model]
        # Half of the tokens at all steps but three.
        shares = [held[0] for held in (found["mapped"], found["last residual"], alone["mapped"])]
        assert shares == [pytest.approx(HALF)] * 3
        if len(found["mapped"]) > 1:
            assert found["mapped"] == pytest.approx(alone["mapped"], abs=1e-3)
            assert found["mapped"] != pytest.approx(found["last residual"], abs=1e-1)


@pytest.mark.gloo
def test_under_pipefusion_plans_do_nothing_and_say_so_once() -> None:
    flags = ("--pipefusion_parallel_degree=2", "--in_turn")
    found = run_world("tokens_worker.py", 2, "--model", "flux", "pixart", *flags, timeout_s=400)
    for rank in found.values():
        assert rank["warnings"] == 1
        for place, model in enumerate(("flux", "pixart")):
            plans = {plan: rank["models"][model][plan] for plan in plans_of(place, in_turn=True)}
            assert all(of["spatial"] == 0 and of["repeats"] for of in plans.values())
            assert all(plans[plan]["exact"] for plan in {"all move", "reuse"} & set(plans))
            assert plans["block cache too"]["blocks"] > 0.1

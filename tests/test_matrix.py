"""Every registered model x every layout of xDiT, as real processes; generated from the registry.

One spawned world per layout runs all models that xDiT itself runs there uncached.
"""

from __future__ import annotations

from typing import Any

import pytest
from matrix_worker import STEPS
from tiny_models import TINY_PIPELINES
from worlds import WorldFailed, launch, run_world

from diffusers_adapters.registry import adapters

PIPEFUSION, ULYSSES = "--pipefusion_parallel_degree", "--ulysses_degree=2"
CFG = "--use_cfg_parallel"
LAYOUTS = {
    "1 rank": (1, ()),
    "ulysses 2": (2, (ULYSSES,)),
    "ring 2": (2, ("--ring_degree=2",)),
    "pipefusion 2": (2, (f"{PIPEFUSION}=2",)),
    "cfg 2": (2, (CFG,)),
    "data 2": (2, ("--data_parallel_degree=2",)),
    "pipefusion 2 x ulysses 2": (4, (f"{PIPEFUSION}=2", ULYSSES)),
    "cfg 2 x pipefusion 2": (4, (CFG, f"{PIPEFUSION}=2")),
    "cfg 2 x ulysses 2": (4, (CFG, ULYSSES)),
    "pipefusion 4": (4, (f"{PIPEFUSION}=4",)),
}
# What xDiT cannot do uncached: model, flag in the layout -> xDiT's own error.
EXCLUDED = {("flux", CFG): "CFG parallelism is not supported by the model"}


def excluded(model: str, layout: str) -> bool:
    return any(model == m and flag in LAYOUTS[layout][1] for m, flag in EXCLUDED)


CELLS = [(m, layout) for layout in LAYOUTS for m in adapters() if not excluded(m, layout)]
_worlds: dict[str, dict[int, dict[str, Any]]] = {}


@pytest.fixture(params=CELLS, ids=lambda cell: f"{cell[0]}, {cell[1]}")
def cell(request: pytest.FixtureRequest) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """What every rank reports of one model in one layout, and its decision group."""
    model, layout = request.param
    if layout not in _worlds:
        ranks, flags = LAYOUTS[layout]
        models = [m for m, at in CELLS if at == layout]
        _worlds[layout] = run_world("matrix_worker.py", ranks, "--model", *models, *flags)
    reports = list(_worlds[layout].values())
    return [report["models"][model] for report in reports], [r["group"] for r in reports]


def test_every_registered_adapter_is_in_the_matrix() -> None:
    assert set(adapters()) == set(TINY_PIPELINES)
    assert {model for model, _ in CELLS} == set(adapters())


@pytest.mark.gloo
def test_a_cell_runs_cached_and_all_its_ranks_agree(
    cell: tuple[list[dict[str, Any]], list[list[int]]],
) -> None:
    ranks, groups = cell
    assert any(rank["has_output"] for rank in ranks)
    for key in ("control_repeats", "threshold_0_exact", "restored_exact"):
        assert all(rank[key] for rank in ranks), key
    for granularity in ("granularity stack", "granularity 3"):
        cached = [rank[granularity] for rank in ranks]
        assert all(c["repeats"] and c["changed"] and c["finite"] for c in cached)
        assert all(c["hits"] >= 0.4 for c in cached)
        assert all(c["collectives_per_step"] == 1 for c in cached)
        assert all(c["steps"] == 2 * STEPS for c in cached)
        by_group: dict[tuple[int, ...], set[str]] = {}
        for group, c in zip(groups, cached, strict=True):
            by_group.setdefault(tuple(group), set()).add(c["digest"])
        assert all(len(digests) == 1 for digests in by_group.values())


@pytest.mark.gloo
@pytest.mark.parametrize(("model", "flag"), EXCLUDED)
def test_what_is_excluded_fails_in_xdit_itself(model: str, flag: str) -> None:
    with pytest.raises(WorldFailed) as failed:
        launch("xdit_control.py", 2, "--model", model, flag, timeout_s=120)
    assert EXCLUDED[model, flag] in failed.value.output

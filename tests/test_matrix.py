"""Every tiny pipeline x every layout of xDiT x every backend, as real processes.

One spawned world per layout runs all models that xDiT itself runs there uncached. What xDiT
computes there is checked too, against one rank. Every registered adapter and backend is in it.
Second versions of a family on four ranks are slow: `pytest -m slow tests/test_matrix.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from layouts import EXCLUDED, LAYOUTS, Exclusion
from matrix_worker import STEPS, VARIANTS
from tiny_models import ADAPTER_OF, TINY_PIPELINES
from worlds import WorldFailed, launch, run_world

from diffusers_adapters.registry import adapters
from xfuser_fastcache.backends import BACKENDS


def excluded(model: str, layout: str) -> bool:
    """Whether xDiT itself cannot run the model's family there."""
    flags = LAYOUTS[layout][1]
    return any(ADAPTER_OF[model] == e.model and e.flag in flags for e in EXCLUDED)


def is_slow(model: str, layout: str) -> bool:
    """Whether a cell is left out unless asked for: second versions of a family on four ranks."""
    families = list(ADAPTER_OF.values())
    first = families.index(ADAPTER_OF[model]) == list(ADAPTER_OF).index(model)
    return LAYOUTS[layout][0] > 2 and not first


CELLS = [(m, layout) for layout in LAYOUTS for m in TINY_PIPELINES if not excluded(m, layout)]
_worlds: dict[tuple[str, bool], list[dict[str, Any]]] = {}


@dataclass(frozen=True)
class Cell:
    """What every rank reports of one model in one layout.

    Attributes:
        ranks: the reports, by rank.
        groups: the decision group of every rank.
        replicas: degree of data parallelism.
        least_hits: share of blocks that must be skipped, 0 to 1. In a pipeline decisions lag,
            and their statistics are scaled up where gaps in noise grow, as PixArt's do.
        references: what one rank computes, for each size of the batch.
    """

    ranks: list[dict[str, Any]]
    groups: list[tuple[int, ...]]
    replicas: int
    least_hits: float
    references: dict[str, Any]


def reports(layout: str, slow: bool) -> list[dict[str, Any]]:
    """Run the world of a layout's slow or other cells once, and return its reports, by rank."""
    if (layout, slow) not in _worlds:
        ranks, flags = LAYOUTS[layout]
        models = [m for m, at in CELLS if at == layout and is_slow(m, at) == slow]
        batches = ("--reference_batch", "1", "2") if ranks == 1 else ()
        world = run_world("matrix_worker.py", ranks, "--model", *models, *batches, *flags)
        _worlds[layout, slow] = [world[rank] for rank in sorted(world)]
    return _worlds[layout, slow]


@pytest.fixture(
    params=[pytest.param(c, marks=pytest.mark.slow if is_slow(*c) else ()) for c in CELLS],
    ids=lambda cell: f"{cell[0]}, {cell[1]}",
)
def cell(request: pytest.FixtureRequest) -> Cell:
    model, layout = request.param
    found = reports(layout, is_slow(model, layout))
    return Cell(
        ranks=[report["models"][model] for report in found],
        groups=[tuple(report["group"]) for report in found],
        replicas=2 if "--data_parallel_degree=2" in LAYOUTS[layout][1] else 1,
        least_hits=0.15 if "pipefusion" in layout else 0.4,
        references=reports("1 rank", slow=False)[0]["models"][model]["references"],
    )


def test_every_registered_adapter_is_in_the_matrix() -> None:
    assert set(ADAPTER_OF) == set(TINY_PIPELINES) == {model for model, _ in CELLS}
    assert set(ADAPTER_OF.values()) == set(adapters())
    for model, adapter in ADAPTER_OF.items():
        pipeline, _ = TINY_PIPELINES[model]()
        assert adapters()[adapter].supports(pipeline.transformer)


@pytest.mark.gloo
def test_a_cell_computes_what_one_rank_computes(cell: Cell) -> None:
    """Uncached, with PipeFusion's steps synchronous: no keys and values are stale."""
    expected = cell.references[str(cell.replicas)]
    held = [rank["synchronous"] for rank in cell.ranks if rank["has_output"]]
    assert len(held) == cell.replicas
    norms = [norm for described in held for norm in described["sample_norms"]]
    assert norms == pytest.approx(expected["sample_norms"], rel=1e-6)
    if cell.replicas == 1:
        assert held[0]["values"] == pytest.approx(expected["values"], rel=1e-4, abs=1e-4)


@pytest.mark.gloo
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cell_runs_cached_and_all_its_ranks_agree(cell: Cell, backend: str) -> None:
    assert all(rank["control_repeats"] for rank in cell.ranks)
    # All ranks of a replica decide together: both of CFG parallel, though they see different text.
    assert {len(group) for group in cell.groups} == {len(cell.ranks) // cell.replicas}
    found = [rank["backends"][backend] for rank in cell.ranks]
    assert all(f["threshold_0_exact"] and f["restored_exact"] for f in found)
    for variant in VARIANTS:
        cached = [f[variant] for f in found]
        assert all(c["repeats"] and c["changed"] and c["finite"] for c in cached)
        assert all(c["hits"] >= cell.least_hits for c in cached)
        assert all(c["collectives_per_step"] == 1 for c in cached)
        assert all(c["steps"] == 2 * STEPS for c in cached)
        by_group: dict[tuple[int, ...], set[str]] = {}
        for group, c in zip(cell.groups, cached, strict=True):
            by_group.setdefault(group, set()).add(c["digest"])
        assert len(by_group) == cell.replicas
        assert all(len(digests) == 1 for digests in by_group.values())


@pytest.mark.gloo
@pytest.mark.parametrize("exclusion", EXCLUDED, ids=lambda e: f"{e.model} {e.flag}")
def test_what_is_excluded_fails_in_xdit_itself(exclusion: Exclusion) -> None:
    flags = ("--model", exclusion.model, exclusion.flag)
    with pytest.raises(WorldFailed) as failed:
        launch("xdit_control.py", 2, *flags, timeout_s=120)
    assert exclusion.error in failed.value.output

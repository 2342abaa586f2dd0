"""Every tiny pipeline x every layout of xDiT x every backend, as real processes.

One spawned world per layout runs all models that xDiT itself runs there uncached. What xDiT
computes there is checked too, against one rank. Every registered adapter and backend is in it:
`Fast` in each cell, the others in turn, so that every model meets each of them. All of them in
each cell, and second versions of a family on four ranks, are slow: `pytest -m slow
tests/test_matrix.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from support.matrix import IN_CI, STEPS, VARIANTS, is_first_of_family, variants
from support.worlds import WorldFailed, launch, run_world

from diffusers_adapters.registry import adapters
from diffusers_adapters.tiny import TINY_MODELS
from xfuser_fastcache.backends import BACKENDS
from xfuser_fastcache.benchmarks.layouts import EXCLUDED, LAYOUTS, ONE_RANK
from xfuser_fastcache.chaos.families import runs_in

CELLS = [(m, layout) for layout in LAYOUTS for m in TINY_MODELS if runs_in(m, LAYOUTS[layout][1])]
CELLS_OF = {model: [at for m, at in CELLS if m == model] for model in TINY_MODELS}
OTHERS = [name for name in BACKENDS if name != "Fast"]
EVERYWHERE = [name for name in TINY_MODELS if name not in IN_CI]


def is_slow(model: str, layout: str, backend: str) -> bool:
    """Whether a case is left out unless asked for.

    Second versions of a family on four ranks are, and in each cell all backends but `Fast` and one
    other: the next model has the next one, and so has the next layout. A model that few layouts
    run meets all backends on one rank. Of models that CI does not run everywhere, all backends run
    on one rank if they are the first of their family and `IN_CI` names a layout; `Fast` does, and
    in the layouts that it names.
    """
    tiny, everywhere = TINY_MODELS[model], model not in IN_CI
    first = is_first_of_family(model) and IN_CI.get(model)
    if layout == ONE_RANK and (tiny.of_runner if everywhere else first):
        return False
    if not everywhere:
        return backend != "Fast" or layout not in (ONE_RANK, *IN_CI[model])
    turn = EVERYWHERE.index(model) + CELLS_OF[model].index(layout)
    in_turn = backend in ("Fast", OTHERS[turn % len(OTHERS)])
    return not in_turn or (LAYOUTS[layout][0] > 2 and not is_first_of_family(model))


CASES = [(model, layout, backend) for model, layout in CELLS for backend in BACKENDS]
SLOW = (pytest.mark.slow, pytest.mark.timeout(1500))
_worlds: dict[tuple[str, bool], list[dict[str, Any]]] = {}


@dataclass(frozen=True)
class Case:
    """What every rank reports of one model in one layout under one backend.

    Attributes:
        variants: the ways in which its backend ran.
        backend: its name.
        ranks: the reports, by rank.
        groups: the decision group of every rank.
        replicas: degree of data parallelism.
        deciders: how many groups decide by themselves: a replica, or one of its branches where each
            has a model of its own.
        models: that a rank runs at every step.
        takes_over: steps at which another model takes over, which has nothing to stand in then.
        of_runner: whether xfuser has no pipeline class for it, and its runner takes it.
        in_stages: whether it is a pipeline.
        same_corrections: whether a calibration corrects as on one rank. Not in a pipeline, whose
            last stage does not see the latents; nor where a rank that shares guidance is given both
            branches (Z-Image), and takes the corrections of its own.
        least_hits: share of blocks that must be skipped, 0 to 1. In a pipeline decisions lag,
            and their statistics are scaled up where gaps in noise grow, as PixArt's do.
        references: what one rank computes, for each size of the batch.
    """

    variants: list[str]
    backend: str
    ranks: list[dict[str, Any]]
    groups: list[tuple[int, ...]]
    replicas: int
    deciders: int
    models: int
    takes_over: int
    of_runner: bool
    in_stages: bool
    same_corrections: bool
    least_hits: float
    references: dict[str, Any]


def turn_of(layout: str) -> int:
    """Return whose turn it is of the ways in which a backend may run."""
    return list(LAYOUTS).index(layout)


def references(model: str) -> dict[str, Any]:
    """Return what one rank computes, for each size of the batch: one is what its own cell runs."""
    alone = reports(ONE_RANK, slow=False)[0]["models"][model]
    one = {name: alone[name] for name in ("synchronous", "corrected") if name in alone}
    return {"1": one, **alone["references"]}


def reports(layout: str, slow: bool) -> list[dict[str, Any]]:
    """Run the world of a layout's slow or other cases once, and return its reports, by rank."""
    if (layout, slow) not in _worlds:
        ranks, flags = LAYOUTS[layout]
        backends: dict[str, list[str]] = {}
        for model, at, backend in CASES:
            if at == layout and is_slow(model, at, backend) == slow:
                backends.setdefault(model, []).append(backend)
        cases = [f"{model}:{','.join(names)}" for model, names in backends.items()]
        batches = ("--reference_batch", "2") if ranks == 1 else ()
        turn = turn_of(layout)
        more = ("--turn", str(turn), *(["--slow"] if slow else []))
        world = run_world(
            "matrix_worker.py", ranks, "--case", *cases, *more, *batches, *flags, timeout_s=1200
        )
        _worlds[layout, slow] = [world[rank] for rank in sorted(world)]
    return _worlds[layout, slow]


@pytest.fixture(
    params=[pytest.param(c, marks=SLOW if is_slow(*c) else ()) for c in CASES],
    ids=", ".join,
)
def case(request: pytest.FixtureRequest) -> Case:
    model, layout, backend = request.param
    slow = is_slow(model, layout, backend)
    found = reports(layout, slow)
    in_stages = "pipefusion" in layout
    least = 0.15 if in_stages else 0.3
    tiny = TINY_MODELS[model]
    replicas = 2 if "--data_parallel_degree=2" in LAYOUTS[layout][1] else 1
    guidance_shared = "cfg" in layout
    apart = guidance_shared and adapters()[tiny.adapter].branches_apart
    return Case(
        variants=list(variants(model, backend, slow, turn_of(layout))),
        backend=backend,
        ranks=[report["models"][model] for report in found],
        groups=[tuple(report["models"][model]["group"]) for report in found],
        replicas=replicas,
        deciders=replicas * (2 if apart else 1),
        models=1 if guidance_shared else tiny.models_a_step,
        takes_over=found[0]["models"][model]["denoisers"] - tiny.models_a_step,
        of_runner=tiny.of_runner and not in_stages,
        in_stages=in_stages,
        same_corrections=not in_stages,
        least_hits=least if backend == "Fast" else least / 2,
        references=references(model),
    )


def test_every_registered_adapter_is_in_the_matrix() -> None:
    assert set(TINY_MODELS) == {model for model, _ in CELLS}
    assert {tiny.adapter for tiny in TINY_MODELS.values()} == set(adapters())
    for tiny in TINY_MODELS.values():
        pipeline, _ = tiny.make()
        assert adapters()[tiny.adapter].supports(pipeline.transformer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_registered_backend_is_in_every_layout_and_several_of_them_in_ci(layout: str) -> None:
    quick = {b for m, at, b in CASES if at == layout and not is_slow(m, at, b)}
    assert {b for _, at, b in CASES if at == layout} == set(BACKENDS)
    models = sum((model, layout) in CELLS for model in EVERYWHERE)
    assert len(quick) >= min(len(BACKENDS), 1 + models // 2)


def test_every_registered_backend_meets_every_family_in_ci_that_runs_in_several_layouts() -> None:
    for model in TINY_MODELS:
        if IN_CI.get(model) == () or not (model in EVERYWHERE or is_first_of_family(model)):
            continue
        met = {b for m, at, b in CASES if m == model and not is_slow(m, at, b)}
        assert met == set(BACKENDS), model


@pytest.mark.gloo
def test_a_cell_computes_what_one_rank_computes(case: Case) -> None:
    """Uncached, with PipeFusion's steps synchronous: no keys and values are stale.

    Where corrections are the same also with a calibration's mask: each rank finds those of its
    guidance branch.
    """
    for name, expected in case.references[str(case.replicas)].items():
        if name == "corrected" and not case.same_corrections:
            continue
        held = [rank[name] for rank in case.ranks if rank["has_output"]]
        # A pipeline class of xfuser's gives its pictures to one rank, its runner to all of them.
        assert len(held) == (len(case.ranks) if case.of_runner else case.replicas)
        norms = [norm for described in held for norm in described["sample_norms"]]
        copies = len(held) // case.replicas
        assert norms == pytest.approx(expected["sample_norms"] * copies, rel=1e-6)
        if case.replicas == 1:
            for described in held:
                values = described["values"]
                assert values == pytest.approx(expected["values"], rel=1e-4, abs=1e-4)


@pytest.mark.gloo
def test_a_cell_runs_cached_and_all_its_ranks_agree(case: Case) -> None:
    assert all(rank["restored_exact"] for rank in case.ranks)
    # All ranks of a replica decide together: both of CFG parallel, though they see different text.
    assert {len(group) for group in case.groups} == {len(case.ranks) // case.deciders}
    found = [rank["backends"][case.backend] for rank in case.ranks]
    assert all(f["threshold_0_exact"] for f in found)
    for variant in case.variants:
        cached = [f[variant] for f in found]
        assert all(c["repeats"] and c["changed"] and c["finite"] for c in cached)
        assert all(c["hits"] >= case.least_hits for c in cached)
        assert all(c["collectives_per_step"] == 1 for c in cached)
        assert all(c["steps"] == 2 * STEPS * case.models for c in cached)
        beyond = 0
        if variant == "budget":
            beyond = case.takes_over
            skipped = 1 - (VARIANTS[variant]["computed_steps"] + beyond) / STEPS
            assert all(c["hits"] == pytest.approx(skipped) for c in cached)
        assert all((c["forced_beyond_budget"] > 0) == (beyond > 0) for c in cached)
        by_group: dict[tuple[int, ...], set[str]] = {}
        for group, c in zip(case.groups, cached, strict=True):
            by_group.setdefault(group, set()).add(c["digest"])
        assert len(by_group) == case.deciders
        assert all(len(digests) == 1 for digests in by_group.values())


FIRST_OF = {tiny.adapter: name for name, tiny in reversed(TINY_MODELS.items())}
FAILING = {(FIRST_OF[e.model], e.flag): e.error for e in EXCLUDED} | {
    (name, limit.flag): limit.error
    for name, tiny in TINY_MODELS.items()
    for limit in tiny.limits
    if limit.error
}


def norm_of(ranks: int, *flags: str) -> float:
    """Return the norm of what is drawn."""
    printed = launch("xdit_control.py", ranks, *flags, timeout_s=120)
    found = [json.loads(line)["norm"] for line in printed.splitlines() if line.startswith("{")]
    return next(norm for norm in found if norm is not None)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("model", "flag"),
    [
        pytest.param(*c, marks=SLOW if "video" in c[0] or IN_CI.get(c[0]) == () else ())
        for c in FAILING
    ],
)
def test_what_is_excluded_fails_in_xdit_itself(model: str, flag: str) -> None:
    error = FAILING[model, flag]
    if error is None:
        alone, together = norm_of(1, "--model", model), norm_of(2, "--model", model, flag)
        assert together != pytest.approx(alone, rel=1e-4)  # rounding alone: 1e-8
        return
    with pytest.raises(WorldFailed) as failed:
        launch("xdit_control.py", 2, "--model", model, flag, timeout_s=120)
    assert error in failed.value.output

"""Every way in which xDiT's users ask for a cache gives what the plain call gives, to the bit.

Real ranks over gloo and the trained toys. `-m slow` adds the other layouts, with all models.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.worlds import run_world

from xfuser_fastcache.backends import BACKENDS

WAYS = (
    "from_pretrained", "constructor", "command line", "xDiTParallel",
    "wrapper of xfuser's pipeline",
)  # fmt: skip
STEPS = 8


def check_models(reports: dict[int, dict[str, Any]], models: list[str]) -> None:
    """Check what `native_worker.cases` reports of each model on every rank."""
    assert any(found["models"][m]["has_output"] for found in reports.values() for m in models)
    for found in reports.values():
        assert sorted(found["models"]) == sorted(models)
        for model, cases in found["models"].items():
            assert cases["changed"] and 0 < cases["hits"] < 1, model
            for way in WAYS:
                assert cases[way]["exact"], f"{model}: {way}"
                assert cases[way]["same_decisions"], f"{model}: {way}"
                # xDiT's warm-up run before them is not counted.
                assert cases[way]["steps"] == STEPS, f"{model}: {way}"
            assert cases["xDiTParallel"]["steps_of_wrapper"] == STEPS
            assert cases["removed_exact"] and cases["disabled_exact"], model
    for model in models:
        assert len({found["models"][model]["digest"] for found in reports.values()}) == 1


@pytest.mark.gloo
def test_ways_on_two_ranks() -> None:
    """One world: FLUX in all ways, refusals, the other backends, and xDiT's own caches."""
    reports = run_world(
        "native_worker.py", 2, "--models", "flux", "--others", "--ulysses_degree", "2"
    )
    check_models(reports, ["flux"])
    for found in reports.values():
        assert sorted(found["backends"]) == sorted(BACKENDS)
        assert all(0 < hits < 1 for hits in found["backends"].values()), found["backends"]
        for name, blocks in (("teacache", "TeaCached"), ("fbcache", "FBCached")):
            own = found["xdits_own"][name]
            assert own == {"blocks": f"{blocks}TransformerBlocks", "same": True}
        # Why importing us has to be enough: xfuser alone says nothing and draws uncached.
        assert found["xdits_own"]["cached without us"] is False
        refusals = found["refusals"]
        assert refusals["unknown backend"].startswith("ValueError: unknown cache backend 'Fst'")
        assert "return_org_pipeline=True" in refusals["original pipeline"]
        assert "cache_args and --cache_method ask for different" in refusals["two caches"]
        assert "by use_teacache in cache_args=" in refusals["xDiT's own beside it"]
        assert "unknown cache option 'treshold'" in refusals["wrong option"]


ALL = ["flux", "sd3", "pixart", "pixart-sigma"]


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "models", "flags"),
    [
        (1, ALL, ""),
        (2, ALL, "--ulysses_degree 2"),
        (2, ALL, "--ring_degree 2"),
        (2, ALL, "--pipefusion_parallel_degree 2"),
        (2, ALL[1:], "--use_cfg_parallel"),
        (4, ALL, "--pipefusion_parallel_degree 2 --ulysses_degree 2"),
    ],
    ids=lambda value: str(value).strip("-") if isinstance(value, str) else None,
)
def test_ways_of_every_model(ranks: int, models: list[str], flags: str) -> None:
    arguments = ("--models", *models, *flags.split())
    check_models(run_world("native_worker.py", ranks, *arguments, timeout_s=1200), models)

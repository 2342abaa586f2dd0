"""Statistics: what is counted, under which names, and what a reset leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.flux import STEPS, Flux

from xfuser_fastcache import get_cache_statistics, remove_cache, reset_cache_statistics
from xfuser_fastcache.models.spans import span_of_blocks

every_granularity = pytest.mark.parametrize("granularity", ["stack", 3, "block"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def flux() -> Flux:
    return Flux()


KEYS = [
    "use_cache", "steps", "generations", "block_approx_ratio", "spatial_approx_ratio", "blocks",
    "estimated_flops_saved_ratio", "collectives", "collectives_per_step", "consensus_wait_s",
    "cache_bytes", "audits", "false_skip_rate", "false_skip_interval", "forced_beyond_budget",
    "nonfinite_steps",
    "recomputed", "carried_keys", "decisions_digest", "clock",
]  # fmt: skip
NAMES = [
    *(f"transformer_blocks.{i}" for i in range(2)),
    *(f"single_transformer_blocks.{i}" for i in range(4)),
]


def test_statistics_have_exactly_the_published_keys(flux: Flux) -> None:
    flux.cache()
    before = get_cache_statistics(flux.transformer)
    flux()
    after = get_cache_statistics(flux.transformer)
    assert list(before) == list(after) == KEYS
    assert list(before["blocks"]) == list(after["blocks"]) == NAMES


@every_granularity
def test_statistics_count_what_was_decided(flux: Flux, granularity: Any) -> None:
    flux.cache(granularity=granularity, num_warmup_steps=1, max_consecutive_skips=2)()
    found = get_cache_statistics(flux.transformer)
    spans = span_of_blocks(6, granularity)
    skipped = [sum(flags >> span & 1 for flags in flux.flags) for span in spans]
    assert min(skipped) > 0
    assert found["blocks"] == {
        name: {"computed": STEPS - count, "skipped": count, "hit_ratio": count / STEPS}
        for name, count in zip(NAMES, skipped, strict=True)
    }
    sizes = [
        sum(p.numel() for p in flux.transformer.get_submodule(name).parameters()) for name in NAMES
    ]
    saved = sum(n * s for n, s in zip(skipped, sizes, strict=True)) / sum(sizes) / STEPS
    assert found["estimated_flops_saved_ratio"] == pytest.approx(saved)
    assert found["block_approx_ratio"] == pytest.approx(sum(skipped) / 6 / STEPS)
    assert (found["steps"], found["generations"], found["use_cache"]) == (STEPS, 1, "Fast")
    assert (found["collectives"], found["collectives_per_step"]) == (STEPS, 1)
    assert (found["audits"], found["false_skip_rate"], found["nonfinite_steps"]) == (0, None, 0)
    assert found["decisions_digest"] == flux.engine.decisions.hexdigest()


@pytest.mark.parametrize(("forecaster", "anchors"), [("reuse", 1), ("taylor", 2)])
def test_cache_bytes_are_those_of_the_anchors(flux: Flux, forecaster: str, anchors: int) -> None:
    flux.cache(forecaster=forecaster, granularity=3)()
    image, text, dim = 64, 8, 32
    streams = (image + text) * dim * 4
    bytes_per_anchor = 2 * streams + image * 4
    found = get_cache_statistics(flux.transformer)["cache_bytes"]
    assert found == 3 * anchors * bytes_per_anchor


def test_a_reset_starts_the_counters_anew_and_leaves_the_decisions_alone(flux: Flux) -> None:
    reference = Flux().cache()
    wanted = [reference(), reference()][1]
    flux.cache()()
    digest = get_cache_statistics(flux.transformer)["decisions_digest"]
    reset_cache_statistics(flux.transformer)
    found = get_cache_statistics(flux.transformer)
    # Anchors stay, and with them the bytes that they occupy.
    for name in set(KEYS) - {"use_cache", "blocks", "decisions_digest", "cache_bytes", "clock"}:
        assert not found[name], name
    assert not any(any(row.values()) for row in found["blocks"].values())
    assert found["decisions_digest"] == digest
    assert torch.equal(flux(), wanted)
    found, expected = (get_cache_statistics(f.transformer) for f in (flux, reference))
    assert (found["steps"], found["generations"], found["collectives"]) == (STEPS, 1, STEPS)
    assert found["decisions_digest"] == expected["decisions_digest"] != digest


@pytest.mark.parametrize("scheduler", [True, False], ids=["given", "found"])
def test_comparing_decisions_changes_nothing_on_one_process(flux: Flux, scheduler: bool) -> None:
    plain = Flux().cache(scheduler=scheduler)
    wanted = plain()
    flux.cache(scheduler=scheduler, verify_consensus=True)
    assert torch.equal(flux(), wanted) and torch.equal(flux(), wanted)
    remove_cache(flux.transformer)

"""Guidance in all its forms, and caches side by side: no state crosses from one to another.

Layers: tiny and toy models in diffusers' own pipelines and in plain denoising loops on one process;
the same loops on two gloo ranks (`branches_worker.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from support.flux import STEPS
from support.loops import LEVELS, Branch, begin, cached, denoise, flags_of, same
from support.stack import EVER
from support.turns import Pipeline, take_turns
from support.worlds import run_world
from torch import nn

from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache
from xfuser_fastcache.engine import CacheEngine
from xfuser_fastcache.hooks import hook_on

TOY = Path(__file__).resolve().parent.parent / "toys" / "flux"

every_granularity = pytest.mark.parametrize("granularity", ["stack", 3, "block"])
every_forecaster = pytest.mark.parametrize("forecaster", ["reuse", "linear", "taylor"])
every_model = pytest.mark.parametrize("model", ["flux", "sd3", "pixart"])
named_or_not = pytest.mark.parametrize("named", [False, True], ids=["by order", "by name"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def engine_of(transformer: nn.Module) -> CacheEngine:
    return hook_on(transformer).engine


# ---- plain denoising loops ----------------------------------------------------------------------


@every_granularity
@every_forecaster
@pytest.mark.parametrize(
    ("count", "named"), [(2, False), (4, True)], ids=["2 by order", "4 by name"]
)
def test_each_branch_gets_what_it_gets_alone(
    count: int, granularity: Any, forecaster: str, named: bool
) -> None:
    options = {"granularity": granularity, "forecaster": forecaster, "cache_ratio_threshold": 0.5}
    # They move unequally, so that their flags differ, and their texts are of unequal lengths.
    branches = [Branch(i, moves=(1, 0.1, 6, 2)[i], text_tokens=8 - i) for i in range(count)]
    alone, alone_flags = [], []
    for branch in branches:
        transformer = cached(**options)
        alone += denoise(transformer, branch, named=named)
        alone_flags.append(flags_of(transformer))
    transformer = cached(**options)
    together = denoise(transformer, *branches, named=named)
    assert [flags_of(transformer, i) for i in range(count)] == alone_flags
    assert all(map(same, together, alone))
    assert len({tuple(flags.values()) for flags in alone_flags}) == count
    assert all(any(flags.values()) for flags in alone_flags)
    statistics = get_cache_statistics(transformer)
    assert (statistics["steps"], statistics["collectives"]) == (STEPS, count * STEPS)


def test_a_branch_that_moves_computes_while_one_that_stands_still_skips() -> None:
    transformer = cached(cache_ratio_threshold=0.2, max_consecutive_skips=99)
    denoise(transformer, Branch(0, moves=20), Branch(1, moves=0))
    moving, still = (flags_of(transformer, branch) for branch in (0, 1))
    assert set(moving.values()) == {0}
    assert [still[step] for step in range(STEPS)] == [0, 0, *[1] * (STEPS - 3), 0]


@named_or_not
def test_a_request_repeats_whatever_the_requests_between_had(named: bool) -> None:
    transformer = cached(granularity=3, cache_ratio_threshold=0.8, num_warmup_steps=0)
    a, b, c, d = (Branch(i) for i in range(4))
    requests = [(a, b), (c,), (d, b, a), (b, a)]
    first = [denoise(transformer, *request, named=named) for request in requests]
    again = [denoise(transformer, *request, named=named) for request in reversed(requests)]
    for one, other in zip(first, reversed(again), strict=True):
        assert all(map(same, one, other))
    statistics = get_cache_statistics(transformer)
    assert statistics["block_approx_ratio"] > 0.2
    assert (statistics["generations"], statistics["steps"]) == (8, 8 * STEPS)


# ---- branches that are left out at some steps --------------------------------------------------


@named_or_not
@every_granularity
def test_guidance_in_an_interval_leaves_the_other_branch_as_it_is_alone(
    granularity: Any, named: bool
) -> None:
    a, b = Branch(0), Branch(1)
    alone = denoise(cached(granularity=granularity), a, named=named)[0]
    transformer = cached(granularity=granularity)
    together = denoise(transformer, a, b, named=named, left_out=dict.fromkeys((0, 1, 6, 7), (b,)))
    assert same(together[0], alone)
    # A late branch has no anchor at first, and later spans are measured once more before a skip.
    flags = flags_of(transformer, 1)
    assert [flags[2], bool(flags[4])] == [0, True]


@pytest.mark.parametrize("absent", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("steps", [(3,), (3, 4, 5), (0, 1, 3, 5)], ids=str)
def test_a_named_branch_may_be_left_out_and_come_back(
    absent: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    branches = [Branch(i) for i in range(3)]
    missing = tuple(branches[i] for i in absent)
    left_out = dict.fromkeys(steps, missing)
    options = {"granularity": 3, "num_warmup_steps": 0}
    alone = []
    for branch in branches:
        # Alone, with a still companion that keeps the count of steps.
        alone.append(
            denoise(cached(**options), Branch(9), branch, named=True, left_out=left_out)[1]
        )
    together = denoise(cached(**options), *branches, named=True, left_out=left_out)
    assert all(map(same, together, alone))


def test_a_step_counts_also_where_its_first_branch_is_left_out() -> None:
    a, b = Branch(0), Branch(1)
    transformer = cached()
    denoise(transformer, a, b, named=True, left_out={3: (a,)})
    statistics = get_cache_statistics(transformer)
    assert (statistics["steps"], statistics["collectives"]) == (STEPS, 2 * STEPS - 1)


def test_an_anchor_grows_old_also_while_its_branch_is_left_out() -> None:
    a, b = Branch(0, moves=0), Branch(1, moves=0)
    for missing, wanted in (
        ((4,), {0: 0, 1: 0, 2: 1, 3: 1, 5: 0, 6: 1, 7: 0}),
        ((3,), {0: 0, 1: 0, 2: 1, 4: 1, 5: 0, 6: 1, 7: 0}),
        ((2, 3, 4), {0: 0, 1: 0, 5: 0, 6: 1, 7: 0}),
    ):
        transformer = cached(max_consecutive_skips=3)
        denoise(transformer, a, b, named=True, left_out=dict.fromkeys(missing, (b,)))
        assert flags_of(transformer, 1) == wanted


@pytest.mark.parametrize(("threshold", "skips"), [(0.9, True), (0.3, False)])
def test_a_branch_that_comes_back_is_measured_over_the_whole_gap(
    threshold: float, skips: bool
) -> None:
    """Later spans were measured before the gap; their change is scaled up to it, and counts as
    often as it has been skipped over.
    """
    steady = Branch(1, moves=0)

    def first_skip(**left_out: Any) -> str:
        transformer = cached(granularity="block", cache_ratio_threshold=threshold)
        denoise(transformer, Branch(0), steady, named=True, **left_out)
        flags = flags_of(transformer, 1).values()
        return f"{next(filter(None, flags)):06b}"

    assert first_skip() == "111111"
    came_back = first_skip(left_out={2: (steady,), 3: (steady,)})
    # The first span's change is measured at the step itself: it stood still.
    assert (came_back[0], came_back[-1]) == ("1" if skips else "0", "1")


# ---- guidance in pipelines ---------------------------------------------------------------------


@every_granularity
@every_forecaster
@pytest.mark.parametrize("model", ["sd3", "pixart"])
def test_guidance_in_one_call_is_one_branch(model: str, granularity: Any, forecaster: str) -> None:
    pipe = Pipeline(model)
    uncached = pipe(guidance_scale=4.0)
    first = pipe.cache(granularity=granularity, forecaster=forecaster)(guidance_scale=4.0)
    assert list(flags_of(pipe.transformer)) == list(range(STEPS))
    assert any(flags_of(pipe.transformer).values()) and not torch.equal(first, uncached)
    assert get_cache_statistics(pipe.transformer)["collectives"] == STEPS
    assert not torch.equal(pipe(guidance_scale=1.0), first)
    assert torch.equal(pipe(guidance_scale=4.0), first)
    remove_cache(pipe.transformer)
    assert torch.equal(pipe(guidance_scale=4.0), uncached)


def halved_after(step: int) -> dict[str, Any]:
    """Return a callback that ends guidance, as diffusers' guide has it: it halves SD3's batch."""

    def switch_off(pipe: Any, index: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index != step:
            return {}
        pipe._guidance_scale = 0.0
        return {name: value[-1:] for name, value in given.items()}

    return {
        "callback_on_step_end": switch_off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"],
    }


def test_a_batch_that_guidance_leaves_half_goes_on_as_a_branch_of_its_own() -> None:
    changes = halved_after(3)
    pipe = Pipeline("sd3").cache(cache_ratio_threshold=0)
    exact = pipe(**changes)
    remove_cache(pipe.transformer)
    assert torch.equal(pipe(**changes), exact)
    first = pipe.cache(num_warmup_steps=1)(**changes)
    # Anchors of another shape are none: its first step is computed, and it skips from the next on.
    flags = [entry[1:] for entry in engine_of(pipe.transformer).decisions.entries]
    assert flags == [
        *((0, 0, 0), (1, 0, 1), (2, 0, 1), (3, 0, 1)),
        *((4, 1, 0), (5, 1, 1), (6, 1, 1), (7, 1, 0)),
    ]
    statistics = get_cache_statistics(pipe.transformer)
    assert (statistics["generations"], statistics["steps"]) == (1, STEPS)
    assert torch.equal(pipe(**changes), first) and not torch.equal(first, exact)


@every_granularity
@pytest.mark.parametrize("layers", [[0], [1], [3], [0, 2]], ids=str)
def test_skip_layer_guidance_in_an_interval(granularity: Any, layers: list[int]) -> None:
    """A second call of another batch in which the model leaves blocks out."""
    changes = {
        "skip_guidance_layers": layers,
        "skip_layer_guidance_start": 0.3,
        "skip_layer_guidance_stop": 0.6,
    }
    pipe = Pipeline("sd3")
    uncached = pipe(**changes)
    options = {"granularity": granularity, "num_warmup_steps": 0}
    pipe.cache(cache_ratio_threshold=0, **options)
    assert torch.equal(pipe(**changes), uncached)
    remove_cache(pipe.transformer)
    first = pipe.cache(**options)(**changes)
    assert torch.equal(pipe(**changes), first) and not torch.equal(first, uncached)


def guided_toy(pipe: FluxPipeline, **changes: Any) -> torch.Tensor:
    """Two calls a step under `cache_context`, on the trained toy."""
    call = {
        "prompt": "a large red ring, top left, on dark blue",
        "negative_prompt": "a small green square, center, on black",
        "true_cfg_scale": 2.0,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **{"height": 128, "width": 128, "max_sequence_length": 32},
    }
    return pipe(**{**call, **changes}).images


def test_guidance_in_two_calls_on_the_trained_toy() -> None:
    pipe = FluxPipeline.from_pretrained(TOY, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    transformer = pipe.transformer
    wanted = guided_toy(pipe)

    def cached_toy(threshold: float) -> nn.Module:
        options = {"scheduler": pipe.scheduler, "cache_ratio_threshold": threshold}
        return apply_cache_on_transformer(transformer, granularity=3, **options)

    cached_toy(0)
    assert torch.equal(guided_toy(pipe), wanted)
    remove_cache(transformer)
    cached_toy(0.3)
    found = guided_toy(pipe)
    error = (found - wanted).square().mean() / wanted.square().mean()
    assert 0 < error < 0.01
    # Both calls see the same latents at first; what guidance makes of later spans differs.
    flags = [flags_of(transformer, branch) for branch in (0, 1)]
    assert all(any(f.values()) for f in flags) and flags[0] != flags[1]
    unguided = guided_toy(pipe, negative_prompt=None)
    assert torch.equal(guided_toy(pipe), found)
    assert torch.equal(guided_toy(pipe, negative_prompt=None), unguided)


# ---- two cached pipelines of one class ---------------------------------------------------------

ONE = {"cache_ratio_threshold": 0.8, "forecaster": "reuse", "granularity": "block"}
OTHER = {
    "cache_ratio_threshold": EVER,
    "forecaster": "taylor",
    "granularity": 2,
    "max_consecutive_skips": 1,
}


def counted(transformer: nn.Module) -> dict[str, Any]:
    """Return the statistics that are no clock readings."""
    statistics = get_cache_statistics(transformer)
    return {name: value for name, value in statistics.items() if name != "consensus_wait_s"}


@every_model
@pytest.mark.parametrize("turns", ["generations", "steps in threads"])
def test_two_cached_pipelines_of_one_class_do_not_touch_each_other(model: str, turns: str) -> None:
    alone = [Pipeline(model, seed).cache(**o) for seed, o in enumerate((ONE, OTHER))]
    wanted = [[pipe() for _ in range(2)][1] for pipe in alone]
    pipes = [Pipeline(model, seed).cache(**o) for seed, o in enumerate((ONE, OTHER))]
    for _ in range(2):
        if turns == "generations":
            found = [pipe() for pipe in pipes]
        else:
            found = take_turns(*(pipe.stepwise for pipe in pipes))
        assert same(found, wanted)
    found, expected = ([counted(p.transformer) for p in some] for some in (pipes, alone))
    assert found == expected
    assert all(0 < statistics["block_approx_ratio"] < 1 for statistics in found)
    assert found[0]["blocks"] != found[1]["blocks"]
    remove_cache(pipes[0].transformer)
    assert torch.equal(pipes[1](), wanted[1])
    assert torch.equal(pipes[0](), Pipeline(model, 0)())


@every_forecaster
def test_steps_of_two_transformers_in_turn_in_one_thread(forecaster: str) -> None:
    one, other = Branch(0), Branch(1)
    options = [{**ONE, "forecaster": forecaster}, OTHER]
    alone = [
        denoise(cached(seed, **o), branch)[0]
        for seed, (o, branch) in enumerate(zip(options, (one, other), strict=True))
    ]
    transformers = [cached(seed, **o) for seed, o in enumerate(options)]
    begin(one, other)
    for step, level in enumerate(LEVELS):
        one.step(transformers[0], level, named=False)
        other.step(transformers[1], level, named=False)
        if step == 4:
            remove_cache(transformers[1])
            break
    assert same(other.outputs, alone[1][:5])
    for level in LEVELS[5:]:
        one.step(transformers[0], level, named=False)
    assert same(one.outputs, alone[0])


# ---- ranks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> dict[int, dict[str, Any]]:
    return run_world("branches_worker.py", 2, timeout_s=200)


@pytest.mark.gloo
@pytest.mark.parametrize(("case", "calls"), [("by_order", 24), ("by_name", 24), ("interval", 21)])
def test_ranks_agree_on_every_branch(
    world: dict[int, dict[str, Any]], case: str, calls: int
) -> None:
    one, other = (world[rank][case] for rank in (0, 1))
    assert one["entries"] == other["entries"]
    assert one["decisions_digest"] == other["decisions_digest"]
    for found in (one, other):
        # Two generations.
        assert (found["collectives"], found["collectives_per_step"]) == (2 * calls, 1.0)
        assert found["alone"] and found["repeats"]
    flags = [[f for *_, b, f in one["entries"] if b == branch] for branch in range(3)]
    assert all(map(any, flags)) and flags[0] != flags[1] != flags[2] != flags[0]


@pytest.mark.gloo
def test_two_caches_on_the_same_ranks_do_not_mix_their_collectives(
    world: dict[int, dict[str, Any]],
) -> None:
    one, other = (world[rank]["two"] for rank in (0, 1))
    assert one["decided"] == other["decided"]
    for found in (one, other):
        assert found["groups"] == 2
        assert found["steps"] and found["generations"]
        assert found["other_removed"] and found["applied_anew"]
        assert [d["collectives"] for d in found["decided"]] == [2 * STEPS] * 2
        assert all(0 < d["block_approx_ratio"] < 1 for d in found["decided"])


@pytest.mark.gloo
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--ulysses_degree=2",), id="ulysses 2"),
        pytest.param(
            ("--pipefusion_parallel_degree=2", "--num_pipeline_patch=2"), id="pipefusion 2"
        ),
    ],
)
@pytest.mark.slow
def test_two_pipelines_of_xfuser_are_cached_side_by_side(flags: tuple[str, ...]) -> None:
    """xfuser has one runtime state a process; uncached, it holds two pipelines of one class."""
    reports = run_world("branches_worker.py", 2, *flags, timeout_s=200)
    assert reports[0]["decided"] == reports[1]["decided"]
    for found in reports.values():
        assert found["uncached"] and found["together"] and found["other_removed"]
        assert found["changed"]
        assert all(0 < d["block_approx_ratio"] < 1 for d in found["decided"])
        assert {d["collectives_per_step"] for d in found["decided"]} == {1.0}

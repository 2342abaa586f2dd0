"""Token plans in the engine, on one process: on arithmetic blocks, then on tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.stack import BARE, DIM, ones
from support.stack import Stack as PlainStack
from torch._dynamo.testing import CompileCounter

from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import (
    CacheConfig,
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.artifacts.linear_map import LinearMap, SpanMaps
from xfuser_fastcache.backends import gate_of
from xfuser_fastcache.tokens.base import CannotForecast
from xfuser_fastcache.tokens.interface import TokenPlan
from xfuser_fastcache.tokens.plan import token_plan
from xfuser_fastcache.tokens.saliency import BUCKETS

COUNT = 16  # image tokens
STEPS = 8


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Stack(PlainStack):
    """Arithmetic blocks under a token plan; `seen` has the number of tokens of each block run.

    Each adds its number and `slope` times what it was given.
    """

    def __init__(self, blocks: int = 2, maps: SpanMaps | None = None, **options: Any):
        options = {
            "cache_ratio_threshold": 0, "num_warmup_steps": 1, "static_kv": "drop", **options,
        }  # fmt: skip
        self.maps = maps
        self.seen: list[int] = []
        self.slope = 0.0
        super().__init__(blocks=blocks, **options)

    def tokens(self, config: CacheConfig, blocks: int) -> TokenPlan:
        plan = token_plan(config.methods.token_plans, [BARE] * blocks, [0.0] * blocks, self.maps)
        assert plan.measures
        return plan

    def block(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            self.ran.append(index)
            self.seen.append(x.shape[1])
            return x + self.slope * x + self.added[index]

        return forward

    def step(self, x: torch.Tensor, level: float) -> tuple[torch.Tensor, list[int]]:
        self.seen = []
        return self(x, level), self.seen

    @property
    def statistics(self) -> dict[str, Any]:
        return self.engine.statistics()


def plane(batch: int = 1, tokens: int = COUNT) -> torch.Tensor:
    return torch.ones(batch, tokens, DIM)


def moved(x: torch.Tensor, *rows: int, item: int = 0) -> torch.Tensor:
    x = x.clone()
    x[item, list(rows)] *= 2
    return x


def test_tokens_that_moved_are_computed_and_static_ones_get_their_last_residual() -> None:
    stack = Stack(motion_threshold=0.1)
    stack.added = [1.0, 2.0]
    x = plane()
    out, seen = stack.step(x, 1.0)
    assert torch.equal(out, x + 3) and seen == [COUNT, COUNT]
    stack.added = [10.0, 20.0]
    second = moved(x, 3, 8)
    out, seen = stack.step(second, 0.9)
    assert seen == [2, 2]
    wanted = second + 3
    wanted[0, [3, 8]] = second[0, [3, 8]] + 30
    assert torch.equal(out, wanted)
    # Each token is measured against the step at which it was computed, and moves as it did then.
    stack.added = [100.0, 200.0]
    third = moved(second, 5)
    out, seen = stack.step(third, 0.8)
    assert seen == [2, 2]
    chosen = 5
    assert out[0, chosen, 0] == third[0, chosen, 0] + 300
    static = [i for i in (3, 8) if out[0, i, 0] != third[0, i, 0] + 300]
    assert static and all(out[0, i, 0] == third[0, i, 0] + 30 for i in static)


@pytest.mark.parametrize("right", [True, False])
def test_a_map_that_is_right_gives_static_tokens_what_computing_them_would(right: bool) -> None:
    """The residual is x / 2 + 1, so that it changes by half of what the input does."""
    half = LinearMap(diagonal=torch.full((DIM,), 0.5))
    maps = SpanMaps((1.0,), (half if right else None,), (None,))
    stack = Stack(blocks=1, motion_threshold=0.1, maps=maps)
    stack.slope, stack.added = 0.5, [1.0]
    x = plane()
    for step in range(4):
        x = moved(x, step) + 0.0625
        out, seen = stack.step(x, 1 - step / 10)
        assert seen == [2 if step else COUNT]
        exact = torch.equal(out, 1.5 * x + 1)
        assert exact if right or not step else not exact


def test_each_static_token_has_the_map_of_its_own_age() -> None:
    biases = tuple(LinearMap(bias=torch.full((DIM,), constant)) for constant in (1.0, 2.0))
    maps = SpanMaps((0.15, 0.35), biases, (None, None))
    stack = Stack(blocks=1, motion_threshold=0.1, maps=maps)
    stack.added, x, gained = [3.0], plane(), []
    for level, moves in ((1.0, ()), (0.9, (0, 1)), (0.8, (2, 3)), (0.6, (4, 5))):
        x = moved(x, *moves)
        out, _ = stack.step(x, level)
        gained.append((out - x)[0, ::2, 0].tolist())
    # Token 0 was computed at the second step, 2 at the third, 4 at the last, the others at the
    # first alone; a gap of 0.4 is beyond all maps.
    assert gained == [
        [3.0] * 8,
        [3.0, *[4.0] * 7],
        [4.0, 3.0, *[5.0] * 6],
        [5.0, 5.0, 3.0, *[3.0] * 5],
    ]


def test_statistics_count_what_maps_of_static_tokens_cost() -> None:
    """Four multiply-adds a token beside the blocks' two, at one of three steps."""
    maps = SpanMaps((1.0,), (LinearMap(diagonal=torch.zeros(DIM)),), (None,))
    found = []
    for used in (None, maps):
        stack = Stack(motion_threshold=0.1, maps=used)
        for level, x in ((1.0, plane()), (0.9, moved(plane(), 3)), (0.8, 9 * plane())):
            stack.step(x, level)
        found.append(stack.statistics)
    saved = [statistics["estimated_flops_saved_ratio"] for statistics in found]
    assert saved[0] - saved[1] == pytest.approx(4 / 2 / 3)
    assert found[0]["spatial_approx_ratio"] == found[1]["spatial_approx_ratio"] > 0
    assert found[1]["cache_bytes"] - found[0]["cache_bytes"] == maps.nbytes() > 0


def test_each_token_is_forecast_from_the_steps_at_which_it_was_computed() -> None:
    """The residual is ten times the noise level, which a skipped step extrapolates."""
    stack = Stack(blocks=1, motion_threshold=0.1, forecaster="taylor", steps_mask=[1, 1, 1, 0])
    x, out = plane(), plane()
    for level, moves in ((1.0, ()), (0.9, (0, 1)), (0.7, (0, 1, 2, 3)), (0.5, ())):
        stack.added = [10 * level]
        x = moved(x, *moves)
        out, _ = stack.step(x, level)
    assert stack.flags == [0, 0, 0, 1]
    gained = (out - x)[0, :, 0]
    # The third and fourth token were computed at the first step and at the third, the last once.
    torch.testing.assert_close(gained[:4], torch.full((4,), 5.0))
    torch.testing.assert_close(gained[4:], torch.full((12,), 10.0))


def test_slow_drift_adds_up_until_a_token_counts_as_moving() -> None:
    stack = Stack(motion_threshold=0.1)
    stack.added = [1.0, 1.0]
    seen = []
    for step in range(5):
        x = plane()
        x[0, 4:] += 0.09 * step
        seen.append(stack.step(x, 1 - step / 10)[1][0])
    # The square of 4 * 0.09 reaches 0.1; two tokens are computed at each step anyway.
    assert seen == [16, 2, 2, 2, 12 - 3 * 2]


def test_identity_blocks_return_their_input_exactly() -> None:
    stack = Stack(motion_threshold=0.5, forecaster="taylor")
    x = torch.randn(2, COUNT, DIM)
    for step in range(5):
        x = torch.where(torch.rand(2, COUNT, 1) < 0.3, torch.randn_like(x), x)
        assert torch.equal(stack.step(x, 1 - step / 10)[0], x)
    assert stack.statistics["spatial_approx_ratio"] > 0.2


def test_a_threshold_of_zero_computes_all_tokens_even_where_nothing_moves() -> None:
    stack = Stack(motion_threshold=0)
    for level in (1.0, 0.9, 0.8):
        assert stack.step(plane(), level)[1] == [COUNT, COUNT]
    assert stack.statistics["spatial_approx_ratio"] == 0


@pytest.mark.parametrize(
    ("rows", "size"), [((), 2), ((1,), 2), ((1, 2, 3), 4), (tuple(range(15)), 16)]
)
def test_what_moves_is_rounded_up_to_a_bucket(rows: tuple[int, ...], size: int) -> None:
    stack = Stack(motion_threshold=0.1)
    stack.step(plane(), 1.0)
    assert stack.step(moved(plane(), *rows), 0.9)[1] == [size, size]


def test_the_item_that_moves_most_sets_the_count_and_each_takes_its_own() -> None:
    stack = Stack(motion_threshold=0.1)
    x = plane(batch=2)
    stack.step(x, 1.0)
    stack.added = [1.0, 0.0]
    x = moved(moved(x, 1, item=0), 2, 4, 6, 8, item=1)
    out, seen = stack.step(x, 0.9)
    assert seen == [4, 4]
    computed = (out - x)[..., 0].bool()
    assert computed.sum(1).tolist() == [4, 4]
    assert computed[0, 1] and computed[1, [2, 4, 6, 8]].all()


def test_a_single_token_is_computed() -> None:
    stack = Stack(motion_threshold=1e9)
    for level in (1.0, 0.9, 0.8):
        assert stack.step(plane(tokens=1), level)[1] == [1, 1]


def test_warm_up_the_last_step_and_what_follows_a_nan_run_on_all_tokens() -> None:
    stack = Stack(motion_threshold=1e9, num_warmup_steps=2, num_steps=7)
    sizes = []
    for step in range(7):
        x = plane()
        if step == 3:
            x[0, 0, 0] = float("nan")
        sizes.append(stack.step(x, 1 - step / 10)[1][0])
    # At the step with the NaN, and at the next, whose anchors may hold it.
    assert sizes == [16, 16, 2, 16, 16, 2, 16]


def test_each_computed_span_runs_on_the_tokens_that_moved_before_the_first_one() -> None:
    stack = Stack(blocks=4, motion_threshold=0.1, granularity=2)
    stack.step(plane(), 1.0)
    assert stack.step(moved(plane(), 7), 0.9)[1] == [2] * 4


def test_under_fb_motion_is_measured_behind_the_first_block() -> None:
    stack = Stack(
        blocks=4, use_cache="Fb", cache_ratio_threshold=0.01, forecaster="reuse",
        motion_threshold=0.1,
    )  # fmt: skip
    stack.added = [1.0, 2.0, 4.0, 8.0]
    assert stack.step(plane(), 1.0)[1] == [COUNT] * 4
    # What the first block adds changes, so that the gate has the others computed.
    stack.added = [1.5, 20.0, 40.0, 80.0]
    x = plane()
    x[0, [3, 8]] *= 4
    out, seen = stack.step(x, 0.9)
    assert seen == [COUNT, 2, 2, 2] and stack.flags == [0, 0]
    wanted = x + 1.5 + 14
    wanted[0, [3, 8]] = x[0, [3, 8]] + 1.5 + 140
    assert torch.equal(out, wanted)
    assert stack.consensus.collectives == 2


@pytest.mark.parametrize("backend", ["Fast", "Tea", "TaylorSeer", "Custom"])
def test_the_plan_acts_under_every_gate_that_measures_before_the_blocks(backend: str) -> None:
    never: dict[str, Any] = {"cache_ratio_threshold": 0.0}
    if backend == "TaylorSeer":
        never = {"cache_ratio_threshold": None, "cache_interval": 1}
    stack = Stack(use_cache=backend, motion_threshold=0.1, **never)
    assert stack.step(plane(), 1.0)[1] == [COUNT] * 2
    assert stack.step(moved(plane(), 3, 8), 0.9)[1] == [2] * 2


def test_what_is_skipped_counts_once() -> None:
    stack = Stack(blocks=4, motion_threshold=0.1, cache_ratio_threshold=0.5, num_warmup_steps=1)
    stack.step(plane(), 1.0)
    stack.step(plane(), 0.9)
    stack.step(moved(plane(), *range(8)), 0.8)
    statistics = stack.statistics
    assert stack.flags == [0, 1, 0]
    # One step in three skipped whole, one on half of the tokens.
    assert statistics["block_approx_ratio"] == pytest.approx(1 / 3)
    assert statistics["spatial_approx_ratio"] == pytest.approx(1 / 6)
    assert statistics["estimated_flops_saved_ratio"] == pytest.approx(1 / 2)


def test_a_last_block_left_out_while_tokens_stand_still_computes_them_all() -> None:
    """Static tokens have had no place: the forward pass runs once more, on all tokens."""
    stack = Stack(blocks=3, motion_threshold=0.1)
    stack.added = [1.0] * 3
    stack.step(plane(), 1.0)
    moving = moved(plane(), 3)
    with pytest.raises(CannotForecast, match="last block of span 0"):
        stack(moving, 0.9, left_out=2)
    stack.engine.recompute()
    stack.seen, x = [], moving
    for index in (0, 1):
        x = stack.run(index, x)
    stack.engine.close()
    assert torch.equal(x, moving + 2) and stack.seen == [COUNT] * 2
    # The step after it has nothing to measure against, and the one after that goes on.
    for level, wanted in ((0.8, [COUNT] * 3), (0.7, [2] * 3)):
        out, seen = stack.step(moved(moving, 5) if level < 0.8 else moving, level)
        assert seen == wanted
        assert torch.equal(out[0, :3], plane()[0, :3] + 3)


def test_an_adaptive_threshold_tightens_as_noise_falls() -> None:
    stack = Stack(adaptive_beta=[0.0, 0.0, 1.0, 0.0])
    stack.step(plane(), 1.0)
    x = moved(plane(), 1, 2, 3, 4)
    x[0, 8:] *= 1.5  # squared relative change 0.25; four tokens have 1.0
    assert stack.step(x, 0.9)[1] == [4, 4]
    stack = Stack(adaptive_beta=[0.0, 0.0, 1.0, 0.0])
    stack.step(plane(), 1.0)
    assert stack.step(x, 0.25)[1] == [12, 12]


def test_the_stages_of_a_pyramid_see_ever_fewer_tokens() -> None:
    stack = Stack(blocks=6, num_stages=3, merge_ratio=0.5, static_kv=None)
    assert stack.step(plane(), 1.0)[1] == [16] * 6
    assert stack.step(plane(), 0.9)[1] == [16, 16, 8, 8, 4, 4]
    # Two steps of six blocks, of which four left out a half and three quarters.
    wanted = (2 * 1 / 2 + 2 * 3 / 4) / 12
    assert stack.statistics["spatial_approx_ratio"] == pytest.approx(wanted)


def test_each_token_gains_what_its_cluster_gains_stage_by_stage() -> None:
    stack = Stack(blocks=3, num_stages=3, static_kv=None)
    stack.added = [1.0, 2.0, 4.0]
    x = torch.randn(2, 37, DIM)
    for level in (1.0, 0.9, 0.8):
        torch.testing.assert_close(stack.step(x, level)[0], x + 7)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 37])
@pytest.mark.parametrize("granularity", ["stack", 2, "block"])
def test_merging_around_identity_blocks_is_exact(tokens: int, granularity: Any) -> None:
    stack = Stack(blocks=4, enable_token_merge=True, motion_threshold=0.5, granularity=granularity)
    x = torch.randn(2, tokens, DIM)
    for step in range(5):
        x = torch.where(torch.rand(2, tokens, 1) < 0.6, torch.randn_like(x), x)
        assert torch.equal(stack.step(x, 1 - step / 10)[0], x)
    assert tokens == 1 or stack.statistics["spatial_approx_ratio"] > 0.1


def test_a_token_that_was_all_zero_is_merged_like_any_other() -> None:
    stack = Stack(blocks=3, enable_token_merge=True)
    x = plane()
    x[0, 3] = 0
    stack.step(x, 1.0)
    out, seen = stack.step(2 * plane(), 0.9)
    assert seen == [16, 8, 4] and out.isfinite().all()


def test_what_moves_is_merged_and_what_stands_still_is_left_out() -> None:
    stack = Stack(blocks=2, num_stages=2, motion_threshold=0.1)
    stack.added = [1.0, 1.0]
    stack.step(plane(), 1.0)
    stack.added = [10.0, 10.0]
    x = moved(plane(), *range(8))
    out, seen = stack.step(x, 0.9)
    assert seen == [8, 4]
    wanted = x + 2
    wanted[:, :8] = x[:, :8] + 20
    torch.testing.assert_close(out, wanted)


# ---- tiny pipelines -----------------------------------------------------------------------------

every_model = pytest.mark.parametrize("model", ["flux", "sd3", "sd3.5", "pixart"])
every_static_kv = pytest.mark.parametrize("static_kv", ["reuse", "drop"])


def generation(model: str, batch: int = 2, **sizes: int) -> tuple[Any, Callable[[], torch.Tensor]]:
    pipe, call = TINY_PIPELINES[model](batch=batch, **sizes)
    pipe.set_progress_bar_config(disable=True)

    def generate() -> torch.Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        return pipe(**{**call, "num_inference_steps": STEPS, "generator": noise}).images

    return pipe, generate


def cached(pipe: Any, run: Callable[[], Any], **options: Any) -> tuple[Any, dict[str, Any]]:
    apply_cache_on_transformer(pipe.transformer, scheduler=pipe.scheduler, **options)
    try:
        return run(), get_cache_statistics(pipe.transformer)
    finally:
        remove_cache(pipe.transformer)


@every_model
@every_static_kv
def test_a_model_runs_on_fewer_tokens_and_is_itself_again(model: str, static_kv: str) -> None:
    pipe, generate = generation(model)
    before, control = list(pipe.transformer.state_dict()), generate()
    forwards = [module.__dict__.get("forward") for module in pipe.transformer.modules()]
    images, statistics = cached(
        pipe, generate, enable_block_approx=False, motion_threshold=1e6, static_kv=static_kv
    )
    assert images.isfinite().all() and not torch.equal(images, control)
    # Five of eight steps on an eighth of the tokens.
    assert statistics["spatial_approx_ratio"] == pytest.approx(5 / 8 * 7 / 8)
    assert 0 < statistics["estimated_flops_saved_ratio"] < statistics["spatial_approx_ratio"] + 1e-6
    exact, statistics = cached(
        pipe, generate, enable_block_approx=False, motion_threshold=0, static_kv=static_kv
    )
    assert torch.equal(exact, control) and statistics["spatial_approx_ratio"] == 0
    merged, statistics = cached(
        pipe, generate, motion_threshold=1e-6, static_kv=static_kv, enable_token_merge=True
    )
    assert merged.isfinite().all() and not torch.equal(merged, control)
    assert statistics["spatial_approx_ratio"] > 0.1
    assert torch.equal(generate(), control)
    assert list(pipe.transformer.state_dict()) == before
    assert forwards == [module.__dict__.get("forward") for module in pipe.transformer.modules()]


@every_model
def test_tokens_that_stay_in_attention_leave_the_moving_ones_as_they_would_be(model: str) -> None:
    """In the first block nothing is approximate: what stands still has the keys that it had."""
    pipe, _ = generation(model)
    transformer = pipe.transformer
    del transformer.transformer_blocks[1:]
    if model == "flux":
        del transformer.single_transformer_blocks[:]
    arguments = recorded(pipe, model)
    # What moved at the second step stands still at the third, as it was at the second.
    if arguments["hidden_states"].dim() == 3:
        first, last = (..., slice(3, 6), slice(None)), (..., slice(9, 12), slice(None))
    else:
        first, last = (..., slice(0, 2), slice(0, 4)), (..., slice(4, 6), slice(0, 4))

    def steps() -> torch.Tensor:
        noise = torch.Generator().manual_seed(5)
        x = arguments["hidden_states"]
        parts = iter((first, last, last))
        for level in (1.0, 0.999999, 0.999998):
            out = transformer(**{**arguments, "hidden_states": x}, timestep=at(level, model, x))
            x = x.clone()
            part = next(parts)
            x[part] += torch.randn(x.shape, generator=noise)[part]
        return out[0]

    exact = steps()
    errors = {}
    for static_kv in ("reuse", "drop"):
        options = {"motion_threshold": 0.05, "enable_block_approx": False, "num_warmup_steps": 1}
        out, statistics = cached(
            pipe, steps, static_kv=static_kv, num_steps=9, forecaster="reuse", **options
        )
        assert statistics["spatial_approx_ratio"] > 0.3
        errors[static_kv] = float((out - exact)[last].norm() / exact[last].norm())
    assert errors["reuse"] < 2e-5 and errors["drop"] > 20 * errors["reuse"]


def recorded(pipe: Any, model: str) -> dict[str, Any]:
    """The keyword arguments of a pipeline's first call of its transformer, but for the timestep."""
    found: list[dict[str, Any]] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states",)
        found.append({**dict(zip(names, args, strict=False)), **kwargs})

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    _, call = TINY_PIPELINES[model](batch=2)
    pipe(**{**call, "num_inference_steps": 2})
    handle.remove()
    arguments = found[0]
    arguments.pop("timestep")
    arguments["return_dict"] = False
    return arguments


def at(level: float, model: str, x: torch.Tensor) -> torch.Tensor:
    scale = 1.0 if model == "flux" else 1000.0
    return torch.full((len(x),), level * scale)


@pytest.mark.slow
@pytest.mark.parametrize(("static_kv", "graphs"), [("drop", 1), ("reuse", 2)])
def test_compiled_blocks_are_compiled_at_most_once_a_bucket(static_kv: str, graphs: int) -> None:
    """Each kind of block meets `BUCKETS` token counts; attention hooks cut its graph in two."""
    torch._dynamo.reset()
    counter = CompileCounter()
    pipe, generate = generation("flux", batch=1, num_layers=2, num_single_layers=1)
    transformer = pipe.transformer
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.forward = torch.compile(block.forward, backend=counter, dynamic=False)
    control = generate()
    sizes = set()
    norm = transformer.transformer_blocks[0].norm2
    handle = norm.register_forward_pre_hook(lambda module, args: sizes.add(args[0].shape[1]))

    def sweep() -> int:
        for threshold in torch.logspace(-4, 1, 6).tolist():
            options = {"motion_threshold": threshold, "enable_block_approx": False}
            cached(pipe, generate, static_kv=static_kv, **options)
        return counter.frame_count

    with torch._dynamo.config.patch(recompile_limit=64):
        uncached = counter.frame_count
        once, again = sweep(), sweep()
    handle.remove()
    assert 3 <= len(sizes) <= BUCKETS
    assert uncached < once <= graphs * uncached * BUCKETS
    assert again == once
    assert torch.equal(generate(), control)


# ---- what does not go together ------------------------------------------------------------------


def test_merging_is_on_where_it_is_asked_for() -> None:
    options = {"token_merge_k": 3, "token_merge_lambda": 0, "num_stages": 2, "merge_ratio": 0.3}
    for name, value in options.items():
        (merging,) = CacheConfig(**{name: value}).methods.token_plans
        assert getattr(merging, name) == value
    for off in ({}, {"enable_token_merge": False, **options}):
        assert CacheConfig(**off).methods.token_plans == ()
    for on in ({"enable_token_merge": True}, {"token_plan": "merging"}):
        assert CacheConfig(**on).resolved().token_plan == ["merging"]
    with pytest.raises(ValueError, match="'merging' does not go with forecaster='output'"):
        CacheConfig(forecaster="output", enable_token_merge=True)


@pytest.mark.parametrize(
    "option", [{"motion_threshold": 0.1}, {"adaptive_beta": [0.1, 0, 0, 0]}, {"static_kv": "drop"}]
)
def test_the_split_is_on_where_it_is_asked_for(option: dict[str, Any]) -> None:
    (split,) = CacheConfig(**option).methods.token_plans
    assert {name: getattr(split, name) for name in option} == option
    spelled = CacheConfig(token_plan={"name": "motion_static", **option})
    assert spelled.resolved() == CacheConfig(**option).resolved()
    assert CacheConfig(enable_spatial_approx=False, **option).methods.token_plans == ()
    assert CacheConfig(enable_spatial_approx=True).resolved().token_plan == ["motion_static"]
    with pytest.raises(ValueError, match="'motion_static' does not go with forecaster='output'"):
        CacheConfig(forecaster="output", **option)
    with pytest.raises(ValueError, match="'motion_static' does not go with calibration='x'"):
        CacheConfig(calibration="x", **option)


def test_plans_are_given_flat_or_in_mappings_and_not_in_both() -> None:
    flat = CacheConfig(motion_threshold=0.2, num_stages=2)
    plans = [
        {"name": "motion_static", "motion_threshold": 0.2},
        {"name": "merging", "num_stages": 2},
    ]
    assert CacheConfig(token_plan=plans).digest() == flat.digest() != CacheConfig().digest()
    assert CacheConfig.from_dict(flat.resolved().to_dict()) == flat.resolved()
    for other in ({"num_stages": 3}, {"enable_spatial_approx": True}):
        with pytest.raises(ValueError, match="are two spellings of token plans; give one of them"):
            CacheConfig(token_plan=plans, **other)
    for wrong in ([], ["merging", "merging"]):
        with pytest.raises(ValueError, match="give at least one, each once"):
            CacheConfig(token_plan=wrong)


@pytest.mark.parametrize("option", [{"motion_threshold": 0.1}, {"enable_token_merge": True}])
def test_plans_are_refused_where_what_they_leave_out_would_be_missed(
    option: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match="enable_adacorrection does not go with token_plan="):
        CacheConfig(enable_adacorrection=True, **option)
    for options in ({"use_cache": "Ada"}, {"gate": {"any_of": ["Fast", "Ada"]}}):
        with pytest.raises(ValueError, match="Ada'.* does not go with token_plan=.* leaves some"):
            gate_of(CacheConfig(**options, **option))


def test_a_plan_of_one_rank_has_its_counts_in_the_one_vector_of_a_step() -> None:
    stack = Stack(adaptive_beta=[0.1, 0.0, 0.0, 0.0])
    stack(ones(), 1.0), stack(ones(), 0.9)
    assert stack.consensus.collectives == 2

"""What every registered backend holds, on every model family, in one process.

Threshold 0 is uncached to the bit, a high one skips and changes the picture, generations repeat,
other sizes in between change nothing, removal restores, dtype stays, branches stay apart. And the
order in which each backend's rule computes and skips, on arithmetic blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.backend_options import NEVER, OFTEN
from support.stack import TOKENS, Stack, ones

from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import (
    CacheConfig,
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.backends import BACKENDS, gate_of
from xfuser_fastcache.config.checks import options_of
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.gates.base import Evidence
from xfuser_fastcache.gates.codebook import CODEBOOKS
from xfuser_fastcache.gates.magnitude import MagnitudeGate
from xfuser_fastcache.hooks import hook_on

STEPS = 9
TWO_STAGES = DecisionGroup(stages=2)
SIZES = {"flux": {"height": 64, "width": 96}}
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_model = pytest.mark.parametrize("model", ["flux", "sd3", "pixart"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Pipeline:
    """A tiny pipeline that repeats its generation."""

    def __init__(self, model: str):
        self.pipe, self.call = TINY_PIPELINES[model]()
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer

    def __call__(self, **changes: Any) -> torch.Tensor:
        call = {**self.call, "num_inference_steps": STEPS, **changes}
        return self.pipe(**{**call, "generator": torch.Generator().manual_seed(1)}).images

    def cache(self, backend: str, **options: Any) -> None:
        apply_cache_on_transformer(
            self.transformer, scheduler=self.pipe.scheduler, use_cache=backend, **options
        )

    @property
    def flags(self) -> list[int]:
        return [flags for *_, flags in hook_on(self.transformer).engine.decisions.entries]


@every_backend
@every_model
def test_a_backend_keeps_what_every_backend_promises(backend: str, model: str) -> None:
    found = Pipeline(model)
    uncached = found()
    before = [sorted(module.__dict__) for module in found.transformer.modules()]
    found.cache(backend, **NEVER[backend])
    assert torch.equal(found(), uncached)
    assert not any(found.flags)
    remove_cache(found.transformer)

    found.cache(backend, **OFTEN[backend])
    first, decided = found(), found.flags
    statistics = get_cache_statistics(found.transformer)
    assert 0.2 < statistics["block_approx_ratio"] < 1
    assert (first.dtype, first.shape) == (uncached.dtype, uncached.shape)
    assert first.isfinite().all() and not torch.equal(first, uncached)
    assert statistics["collectives"] == len(decided) == STEPS
    other = found(num_inference_steps=STEPS - 2, **SIZES.get(model, {}))
    assert torch.equal(found(), first)
    assert found.flags == decided
    remove_cache(found.transformer)
    assert [sorted(module.__dict__) for module in found.transformer.modules()] == before
    assert torch.equal(found(), uncached)
    found.cache(backend, **OFTEN[backend])
    assert torch.equal(found(num_inference_steps=STEPS - 2, **SIZES.get(model, {})), other)


@every_backend
def test_branches_of_guidance_are_decided_apart(backend: str) -> None:
    """Two calls a step: the second one's text is another, and it has a state of its own."""
    guided = {
        "true_cfg_scale": 2.0,
        "negative_prompt_embeds": torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32),
        "negative_pooled_prompt_embeds": torch.linspace(1, -1, 32)[None],
    }
    found = Pipeline("flux")
    uncached = found(**guided)
    found.cache(backend, **NEVER[backend])
    assert torch.equal(found(**guided), uncached)
    remove_cache(found.transformer)
    found.cache(backend, **OFTEN[backend])
    first = found(**guided)
    assert torch.equal(found(**guided), first)
    assert len(found.flags) == 2 * STEPS
    assert get_cache_statistics(found.transformer)["block_approx_ratio"] > 0.2


@every_backend
def test_bfloat16_stays_bfloat16(backend: str) -> None:
    found = Pipeline("flux")
    found.pipe.to(torch.bfloat16)
    embeddings = {k: v.bfloat16() for k, v in found.call.items() if k.endswith("embeds")}
    found.cache(backend, **OFTEN[backend])
    picture = found(**embeddings)
    assert (picture.dtype, bool(picture.isfinite().all())) == (torch.bfloat16, True)
    assert any(found.flags)


@every_backend
@pytest.mark.parametrize("granularity", ["stack", 3, "block"])
def test_every_granularity_skips_and_repeats(backend: str, granularity: Any) -> None:
    found = Pipeline("flux")
    found.cache(backend, granularity=granularity, **OFTEN[backend])
    first = found()
    assert get_cache_statistics(found.transformer)["block_approx_ratio"] > 0.2
    assert torch.equal(found(), first)


@every_backend
def test_a_steps_mask_goes_before_every_gate(backend: str) -> None:
    found = Pipeline("flux")
    found.cache(backend, steps_mask=[1, 1, 0, 1, 0, 0, 1, 0, 1])
    found()
    skips = [bool(flags) for flags in found.flags]
    assert skips == [False, False, True, False, True, True, False, True, False]


@pytest.mark.parametrize(
    ("backend", "references"), [("Fb", 1), ("Tea", 1), ("Ada", 1), ("TaylorSeer", 0)]
)
def test_cache_bytes_are_those_of_anchors_and_references(backend: str, references: int) -> None:
    found = Pipeline("flux")
    found.cache(backend, forecaster="reuse", **OFTEN[backend])
    found()
    image, text, dim = 64, 8, 32
    # Input and residual of both streams, of the one span that may be skipped.
    held = 2 * (image + text) * dim * 4 + references * image * (dim + 1) * 4
    assert get_cache_statistics(found.transformer)["cache_bytes"] == held


# ---- each backend's rule, step by step ----------------------------------------------------------


def levels(count: int) -> list[float]:
    """Noise levels that fall by as much at each step."""
    return [1 - index / 16 for index in range(count)]


def test_fb_runs_its_first_block_always_and_measures_against_the_last_computed_step() -> None:
    stack = Stack(use_cache="Fb", cache_ratio_threshold=0.1)
    ran = []
    for level, first in zip(levels(6), (1.0, 1.05, 1.09, 1.11, 1.15, 1.3), strict=True):
        stack.added = [first, 2.0, 4.0, 8.0]
        stack(ones(), level)
        ran.append(stack.ran)
    # 1.09 is 9 % from 1.0, 1.11 is 11 %; 1.15 is 4 % from 1.11, 1.3 is 17 %.
    whole = [0, 1, 2, 3]
    assert ran == [whole, [0], [0], whole, [0], whole]
    assert stack.flags == [0b00, 0b10, 0b10, 0b00, 0b10, 0b00]
    assert stack.consensus.collectives == 6


def test_fb_adds_the_rests_residual_to_the_first_blocks_present_output() -> None:
    stack = Stack(use_cache="Fb", cache_ratio_threshold=0.5)
    stack.added = [1.0, 2.0, 4.0, 8.0]
    stack(ones(), 1.0)
    stack.added = [1.25, 100.0, 100.0, 100.0]
    assert torch.equal(stack(ones(3.0), 0.9), ones(3.0 + 1.25 + 14.0))


def test_tea_adds_up_changes_from_step_to_step_and_starts_anew_where_it_computes() -> None:
    stack = Stack(use_cache="Tea", cache_ratio_threshold=0.25)
    # Each step changes the input by 10 % of the step before, computed or not.
    for index, level in enumerate(levels(8)):
        stack(ones(1.1**index), level)
    assert stack.flags == [0, 1, 1, 0, 1, 1, 0, 1]


def test_tea_goes_by_its_polynomial() -> None:
    stack = Stack(use_cache="Custom", cache_ratio_threshold=0.25, coefficients=[10.0, 1.0, 0.0])
    # 10 % stands for 10 * 0.01 + 0.1 = 20 %.
    for index, level in enumerate(levels(6)):
        stack(ones(1.1**index), level)
    assert stack.flags == [0, 1, 0, 1, 0, 1]


def test_taylorseer_computes_every_so_many_steps_after_the_warm_up() -> None:
    stack = Stack(use_cache="TaylorSeer", cache_interval=3, num_warmup_steps=2)
    for index, level in enumerate(levels(9)):
        stack(ones(1.5**index), level)
    assert stack.flags == [0, 0, 1, 1, 0, 1, 1, 0, 1]


def test_ada_picks_the_interval_by_the_rate_of_change_of_the_middle_block() -> None:
    stack = Stack(use_cache="Ada", codebook={0.05: 4, 0.2: 2, 1.0: 1})
    computed = []
    # Of four blocks the third is measured: it adds 2 % a step more, then 10 %, then 50 %.
    adds = [1.0, 1.02, 9.0, 9.0, 9.0, 1.5, 9.0, 3.0, 6.0]
    for step, (level, added) in enumerate(zip(levels(9), adds, strict=True)):
        stack.added = [5.0, 5.0, added, 5.0]
        stack(ones(), level)
        if stack.ran:
            computed.append(step)
    # 2 % a step: four steps. Then 47 % over four: 12 % a step, two steps. Then 100 % over two.
    assert computed == [0, 1, 5, 7, 8]


def test_fbs_spans_are_the_first_block_and_cuts_of_the_rest() -> None:
    stack = Stack(use_cache="Fb", cache_ratio_threshold=1.0, granularity=3)
    for level in levels(3):
        stack(ones(), level)
    # Nothing is added, so there is no residual to compare with: everything is computed.
    assert (stack.flags, stack.engine.decisions.spans) == ([0, 0, 0], 4)


@pytest.mark.parametrize(("backend", "at"), [("Fb", 2), ("Tea", 2), ("Ada", 1)])
def test_a_nan_is_computed_through_and_forgotten(backend: str, at: int) -> None:
    """Ada's gate sees computed steps alone."""
    options = {**OFTEN[backend], "max_consecutive_skips": 99, "num_warmup_steps": 1}
    stack = Stack(use_cache=backend, **options)
    stack.added = [1.0, 2.0, 3.0, 4.0]
    for index, level in enumerate(levels(12)):
        stack(ones(torch.nan if index == at else 1.0 + index / 100), level)
    # The step that sees it, or the next one, and the step that is measured against it.
    assert stack.engine.statistics()["nonfinite_steps"] == 2
    assert stack.flags[2:4] == [0, 0]
    assert any(stack.flags[5:])


@pytest.mark.parametrize(
    ("value", "reason"), [(torch.nan, "not finite"), (1e6, "too large to be measured")]
)
def test_the_reason_says_what_is_wrong_with_a_number(value: float, reason: str) -> None:
    stack = Stack(cache_ratio_threshold=1.0, num_warmup_steps=1)
    for index, level in enumerate(levels(8)):
        stack(ones(value if index == 3 else 1.0), level)
    found = [row["reason"] for row in stack.engine.trace()]
    assert found[3] == reason
    assert len({"not finite", "too large to be measured"} & set(found)) == 1


@pytest.mark.parametrize("backend", ["Fb", "Tea", "TaylorSeer", "Ada"])
def test_a_span_whose_output_was_not_seen_is_computed(backend: str) -> None:
    """The model leaves out the last block; these gates do not look at the span itself, and skip."""
    stack = Stack(blocks=5, use_cache=backend, **{**OFTEN[backend], "num_warmup_steps": 2})
    stack.added = [1.0] * 5
    for level in levels(4):
        assert torch.equal(stack(ones(), level, left_out=4), ones(5.0))
        assert stack.ran == [0, 1, 2, 3]
    assert any(stack.flags)
    assert stack.engine.statistics()["estimated_flops_saved_ratio"] == pytest.approx(0)
    # With the last block back in place it has an anchor again.
    assert [stack(ones(), level)[0, 0, 0].item() for level in levels(6)[4:]] == [6.0, 6.0]


# ---- several pipeline stages: the same rules, from statistics that lag -------------------------


@pytest.mark.parametrize(
    ("backend", "lag"), [("Fb", 1), ("Tea", 1), ("TaylorSeer", 1), ("Ada", 2), ("Custom", 1)]
)
def test_a_pipelines_lag_is_that_of_the_stage_that_measures(backend: str, lag: int) -> None:
    """The middle block lies in the second of two stages, the first one in the first."""
    stack = Stack(use_cache=backend, group=TWO_STAGES, held=(2, 2))
    assert stack.engine.plan.rules(stack.consensus).lag == lag


@pytest.mark.parametrize("patched_from", [1, 3])
def test_tea_in_a_pipeline_adds_up_changes_one_step_later(patched_from: int) -> None:
    stack = Stack(use_cache="Tea", cache_ratio_threshold=0.25, group=TWO_STAGES)
    for index, level in enumerate(levels(10)):
        stack.pipelined(ones(1.1**index), level, patched=index >= patched_from)
    # Each step adds 10 %, known a step later; three would be too much.
    first = stack.flags.index(1)
    assert first == max(2, patched_from)
    assert stack.flags[first:] == ([1, 1, 0] * 4)[: 10 - first]


def test_fb_in_a_pipeline_goes_by_the_step_before() -> None:
    stack = Stack(use_cache="Fb", cache_ratio_threshold=0.3, group=TWO_STAGES)
    for index, level in enumerate(levels(8)):
        stack.added = [4.0 if index == 4 else 1.0, 2.0, 4.0, 8.0]
        stack.pipelined(ones(), level, patched=index > 0)
        assert stack.ran[0] == 0
    # The jump at step 4 is known at step 5, which computes and finds all as at step 1.
    assert stack.flags == [0, 0, 2, 2, 2, 0, 2, 2]


@pytest.mark.parametrize(("threshold", "flag"), [(0.29, 0), (0.31, 2)])
def test_fb_in_a_pipeline_brings_its_change_to_the_gap_of_the_step(
    threshold: float, flag: int
) -> None:
    """15 % over one step since the computed one stand for 30 % over two."""
    stack = Stack(use_cache="Fb", cache_ratio_threshold=threshold, group=TWO_STAGES)
    for index, level in enumerate(levels(4)):
        stack.added = [1.15 if index > 1 else 1.0, 2.0, 4.0, 8.0]
        stack.pipelined(ones(), level, patched=index > 0)
    assert stack.flags == [0, 0, 2, flag]


# ---- gates and options --------------------------------------------------------------------------


def evidence(change: float, lag: int = 1, gap: int = 1, tokens: int = TOKENS) -> Evidence:
    """Return evidence of a relative change."""
    return Evidence(change * 8.0, 0.0, 8.0, tokens, 4, lag, (0.8, 0.9, None), gap)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "Fast"])
def test_a_gate_that_never_skips_never_does(backend: str) -> None:
    gate = gate_of(CacheConfig(use_cache=backend, **NEVER[backend]))
    state = gate.init()
    for change in (0.0, 1e-12, 0.5):
        for lag in (1, 2, 20):
            assert not gate.judge(evidence(change, lag), state).may_skip
            state = gate.update(state, evidence(change, lag), skipped=False)


@pytest.mark.parametrize("backend", ["Fb", "Tea", "Custom"])
def test_the_comparison_is_strict(backend: str) -> None:
    options = {} if backend == "Fb" else {"coefficients": [1.0, 0.0]}
    gate = gate_of(CacheConfig(use_cache=backend, cache_ratio_threshold=0.25, **options))
    state = gate.init()
    assert not gate.judge(evidence(0.25), state).may_skip
    assert gate.judge(evidence(0.25 - 1e-9), state).may_skip


RATIOS = [1.0, 0.5, 0.9, 0.9, 1.2, 0.95, 0.9, 0.6, 0.9]


def test_mag_adds_up_how_far_the_product_of_ratios_is_from_one() -> None:
    """By hand: 0.9 and 0.9 * 0.9 are off by 0.1 and 0.19, then by 0.028 with 1.2."""
    gate = MagnitudeGate(0.31, RATIOS)
    state, decided = gate.init(), []
    for step in range(2, len(RATIOS)):
        now = replace(evidence(0.0), elapsed=step / (len(RATIOS) - 1))
        verdict = gate.judge(now, state)
        state = gate.update(state, now, verdict.may_skip)
        decided.append((verdict.statistic, verdict.may_skip))
    statistics = [0.1, 0.29, 0.318, 0.05, 0.195, 0.682, 0.1]
    assert [skips for _, skips in decided] == [s < 0.31 for s in statistics]
    assert [s for s, _ in decided] == pytest.approx(statistics)


def test_mag_skips_by_its_law_in_a_stack_and_never_without_a_known_end() -> None:
    options: dict[str, Any] = {"use_cache": "Mag", "mag_ratios": RATIOS, "num_warmup_steps": 2}
    options["cache_ratio_threshold"] = 0.31
    stack = Stack(num_steps=len(RATIOS), **options)
    for level in levels(len(RATIOS)):
        stack(ones(), level)
    assert stack.flags == [0, 0, 1, 1, 0, 1, 1, 0, 0]
    endless = Stack(**options)
    for level in levels(len(RATIOS)):
        endless(ones(), level)
    assert endless.flags == [0] * len(RATIOS)


@pytest.mark.parametrize("given", ["wan", [], [[1.0]], "", {"flux": 1}, 1.0])
def test_mag_refuses_what_are_no_ratios(given: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="mag_ratios=.*give flux, or list of 1 to"):
        MagnitudeGate(mag_ratios=given)


@pytest.mark.parametrize("book", CODEBOOKS)
def test_a_codebook_is_read_from_its_least_end_up(book: str) -> None:
    gate = gate_of(CacheConfig(use_cache="Ada", codebook=book))
    below = 0.0
    for end, interval in sorted(CODEBOOKS[book].items()):
        for rate in (below, (below + end) / 2):
            assert gate.update(1, evidence(rate * 2, gap=2), skipped=False) == interval
        below = end
    assert gate.update(1, evidence(50.0), skipped=False) == interval


def test_tea_takes_the_published_polynomial_of_flux_and_the_identity_elsewhere() -> None:
    flux = [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861]
    for model, wanted in (("flux", flux), ("sd3", [1.0, 0.0]), ("pixart", [1.0, 0.0])):
        found = Pipeline(model)
        found.cache("Tea")
        assert hook_on(found.transformer).engine.plan.gate.coefficients == wanted
        remove_cache(found.transformer)
        found.cache("Tea", coefficients=[2.0, 0.5])
        assert hook_on(found.transformer).engine.plan.gate.coefficients == [2.0, 0.5]


@pytest.mark.parametrize("backend", ["Fb", "Tea", "Custom", "Ada"])
def test_a_gate_that_rests_on_blocks_refuses_to_forecast_the_whole_forward_pass(
    backend: str,
) -> None:
    words = f"use_cache='{backend}' does not go with forecaster='output': it needs single blocks"
    with pytest.raises(ValueError, match=words):
        Pipeline("flux").cache(backend, forecaster="output")


@every_backend
def test_options_that_are_left_out_are_the_backends_own(backend: str) -> None:
    (gate,) = CacheConfig(use_cache=backend).methods.gates
    # An option of its own asks for the gate, also where it is what it would be.
    asked = {name: getattr(gate, name) for name in list(options_of(gate))[:1]}
    config = CacheConfig(use_cache=backend, **asked).resolved()
    brought = BACKENDS[backend].companions._asdict()
    # Instead of its forecaster, where there is a budget; and that budget.
    brought.pop("budgeted")
    quality = brought.pop("quality")
    assert CacheConfig(use_cache=backend).resolved().quality == quality
    assert config.quality is None
    assert {name: getattr(config, name) for name in brought} == brought
    (gate,) = config.methods.gates
    for name in options_of(gate):
        assert getattr(config, name) == getattr(gate, name) == getattr(BACKENDS[backend](), name)
    assert CacheConfig.from_dict(config.to_dict()) == config == config.resolved()

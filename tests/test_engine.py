"""The engine on one process: when it skips, what it hands on, and what it forgets.

Two layers. On arithmetic blocks, whose outputs prove which path ran; and on a tiny FLUX with
diffusers' own pipeline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from scipy.stats import chi2
from support.tiny_models import tiny_flux

from xfuser_fastcache import (
    CacheConfig,
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
    reset_cache_statistics,
    state,
)
from xfuser_fastcache.backends import gate_of
from xfuser_fastcache.clock.timeline import Schedule
from xfuser_fastcache.consensus.collective import BlockList, Consensus
from xfuser_fastcache.consensus.topology import DecisionGroup, Position
from xfuser_fastcache.engine import CacheEngine
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.measurements.moments import FRACTION as MOMENTS_FRACTION
from xfuser_fastcache.measurements.moments import TOKENS as TOKENS_SLOT
from xfuser_fastcache.measurements.moments import Moments
from xfuser_fastcache.measurements.probes import Probe
from xfuser_fastcache.models.adapter import Step
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.spans import span_of_blocks
from xfuser_fastcache.models.streams import ENCODER, HIDDEN
from xfuser_fastcache.reports.statistics import BlockInfo
from xfuser_fastcache.state.shared import Sighting, rescaled

STEPS = 8
EVER = 1e6  # A threshold that any change stays below.
WHOLE = Position()
every_granularity = pytest.mark.parametrize("granularity", ["stack", 3, "block"])
every_forecaster = pytest.mark.parametrize("forecaster", ["reuse", "linear", "taylor"])

# ---- arithmetic blocks ----------------------------------------------------------------------

TOKENS, DIM = 6, 4
BARE = BlockContract(parameters=(HIDDEN,), returns=(HIDDEN,))
JOINT = BlockContract(parameters=(HIDDEN, ENCODER), returns=(ENCODER, HIDDEN))


class Stack:
    """Blocks that add one number each, run by an engine as a transformer's hooks would."""

    def __init__(self, blocks: int = 4, group: DecisionGroup | None = None, **options: Any):
        if options.get("use_cache", "Fast") == "Fast":
            options = {"cache_ratio_threshold": EVER, **options}
        options = {"forecaster": "reuse", **options}
        config = CacheConfig(**options).resolved()
        consensus = Consensus(
            group or DecisionGroup(),
            backend="gloo",
            timeout_s=60.0,
            config_digest=config.digest(),
            block_lists=(BlockList(blocks, 1),),
        )
        apart = Probe.FIRST_RESIDUAL in gate_of(config).probes
        spans = span_of_blocks(blocks, config.granularity, apart)
        infos = [BlockInfo(f"blocks.{i}", span, 1 / blocks) for i, span in enumerate(spans)]
        self.engine = CacheEngine(
            config,
            consensus,
            infos,
            [BARE] * blocks,
            0,
            DIM,
            modulated=lambda args, kwargs: args[0],
        )
        self.added = [0.0] * blocks
        self.ran: list[int] = []

    def __call__(
        self, x: torch.Tensor, level: float, position: Position = WHOLE, signature: Any = None
    ) -> torch.Tensor:
        self.ran = []
        self.engine.open(level, level, signature, position, x.device)
        for index in range(len(self.added)):
            x = self.engine.run_block(index, self._block(index), (x,), {})
        self.engine.close()
        return x

    def _block(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            self.ran.append(index)
            return x + self.added[index]

        return forward

    @property
    def flags(self) -> list[int]:
        return [flags for *_, flags in self.engine.decisions.entries]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def ones(value: float = 1.0) -> torch.Tensor:
    return torch.full((1, TOKENS, DIM), value)


@pytest.mark.parametrize(
    ("blocks", "granularity", "spans"),
    [
        (5, "stack", [0] * 5),
        (3, "block", [0, 1, 2]),
        (5, 2, [0, 0, 0, 1, 1]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (2, 7, [0, 1]),
        (4, 1, [0] * 4),
    ],
)
def test_blocks_are_cut_into_spans(blocks: int, granularity: Any, spans: list[int]) -> None:
    assert span_of_blocks(blocks, granularity) == spans


def test_a_skipped_span_runs_no_block_and_moves_its_input_by_the_anchors_residual() -> None:
    stack = Stack(num_warmup_steps=1)
    stack.added = [1.0, 2.0, 4.0, 8.0]
    assert torch.equal(stack(ones(), 1.0), ones(16.0))
    stack.added = [100.0] * 4
    assert torch.equal(stack(ones(3.0), 0.9), ones(18.0))
    assert (stack.ran, stack.flags) == ([], [0, 1])


def test_each_span_is_decided_by_its_own_change() -> None:
    stack = Stack(blocks=2, granularity="block", cache_ratio_threshold=0.1)
    for level, second in ((1.0, 0.0), (0.9, 1.0), (0.8, 2.0)):
        stack.added = [second, 1.0]
        stack(ones(), level)
    # The first span's input stands still, the second's moved in the step before.
    assert (stack.flags, stack.ran) == ([0, 0, 0b01], [1])


def test_a_skipped_span_hands_its_input_on_up_to_its_last_block() -> None:
    stack = Stack(blocks=3, num_warmup_steps=1)
    stack.added = [1.0] * 3
    stack(ones(), 1.0)
    stack.engine.open(0.9, 0.9, None, WHOLE, torch.device("cpu"))
    handed = [stack.engine.run_block(i, stack._block(i), (ones(2.0),), {}) for i in range(3)]
    assert [x[0, 0, 0].item() for x in handed] == [2.0, 2.0, 5.0]


@pytest.mark.parametrize(("factor", "skips"), [(0.99, True), (1.01, False)])
def test_the_change_is_measured_against_the_last_computed_step(factor: float, skips: bool) -> None:
    epsilon = 0.1
    # Equal changes in all tokens: as many degrees of freedom as tokens. Two steps after the anchor
    # a change counts twice.
    delta = epsilon * (chi2.ppf(0.05, TOKENS) / TOKENS) ** 0.5 * factor / 2
    stack = Stack(num_warmup_steps=1, cache_ratio_threshold=epsilon)
    for level, value in ((1.0, 1.0), (0.9, 1.0 + delta / 2), (0.8, 1.0 + delta)):
        stack(ones(value), level)
    assert stack.flags == [0, 1, int(skips)]


@pytest.mark.parametrize(("factor", "skips"), [(0.99, True), (1.01, False)])
def test_a_later_spans_last_change_is_scaled_to_the_gap_to_its_newest_anchor(
    factor: float, skips: bool
) -> None:
    epsilon = 0.1
    stack = Stack(blocks=2, granularity="block", cache_ratio_threshold=epsilon)
    # Measured over a gap of 0.1 in noise, used over one of 0.4.
    delta = epsilon * (chi2.ppf(0.05, TOKENS) / TOKENS) ** 0.5 * factor / 4
    for level, added in ((1.0, 0.0), (0.9, delta), (0.5, delta)):
        stack.added = [added, 0.0]
        stack(ones(), level)
    assert stack.flags == [0, 0, 0b11 if skips else 0b01]


@every_granularity
def test_a_threshold_of_zero_computes_even_where_nothing_moves(granularity: Any) -> None:
    stack = Stack(cache_ratio_threshold=0, granularity=granularity, num_warmup_steps=0)
    for level in (1.0, 0.9, 0.8):
        stack(ones(), level)
    assert stack.flags == [0, 0, 0]


def test_no_block_approximation_means_that_all_is_computed() -> None:
    stack = Stack(enable_block_approx=False)
    for level in (1.0, 0.9, 0.8, 0.7):
        stack(ones(), level)
    assert stack.flags == [0, 0, 0, 0]


def test_in_a_pipeline_an_anchor_outlives_the_buffer_that_it_came_in() -> None:
    stack = Stack()
    stack.engine.agreement.lag = 1
    buffer = ones()
    stack(buffer, 1.0)
    buffer.fill_(70.0)
    (anchor,) = stack.engine.branches[0].memories[0][state.WHOLE].anchors
    assert torch.equal(anchor.inputs.hidden_states, ones())


def test_branches_have_anchors_of_their_own() -> None:
    stack = Stack(num_warmup_steps=1)
    for branch in (0, 1):
        stack.added = [10.0**branch] * 4
        stack(ones(), 1.0)
    assert [stack(ones(), 0.9)[0, 0, 0].item() for _ in range(2)] == [5.0, 41.0]
    assert [entry[1:] for entry in stack.engine.decisions.entries] == [
        (0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "second", [{"level": 1.0}, {"level": 0.8, "signature": "other shape"}], ids=["noise", "shape"]
)
def test_a_new_generation_forgets_the_anchors_of_the_old_one(second: dict[str, Any]) -> None:
    stack = Stack(num_warmup_steps=0)
    stack(ones(), 1.0), stack(ones(), 0.9)
    assert stack.flags == [0, 1]
    stack(ones(), **second)
    assert (stack.flags, stack.ran) == ([0], [0, 1, 2, 3])


def test_after_an_exception_a_generation_starts_even_where_the_noise_goes_on_falling() -> None:
    stack = Stack(num_warmup_steps=1)
    stack(ones(), 1.0)
    stack.engine.open(0.9, 0.9, None, WHOLE, torch.device("cpu"))
    stack.engine.abandon(ValueError("a block failed"))
    stack(ones(), 0.8)
    assert (stack.engine.decisions.entries, stack.ran) == ([(1, 0, 0, 0)], [0, 1, 2, 3])


def test_a_rank_that_counts_no_tokens_computes_when_others_see_a_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = Stack(group=DecisionGroup(counts_tokens=False), num_warmup_steps=0)
    monkeypatch.setattr(stack.engine.consensus, "wait", lambda ticket: [[0, 0, 0, 9, 1, 0]])
    stack.added = [1.0] * 4
    assert [stack(ones(), level)[0, 0, 0].item() for level in (1.0, 0.9)] == [5.0, 5.0]
    assert (stack.flags, stack.ran) == ([0, 0], [0, 1, 2, 3])


def left_out(stack: Stack, block: int, x: torch.Tensor, level: float) -> torch.Tensor:
    """Run a step in which the model does not call one of its blocks."""
    stack.ran = []
    stack.engine.open(level, level, None, WHOLE, x.device)
    for index in {*range(len(stack.added))} - {block}:
        x = stack.engine.run_block(index, stack._block(index), (x,), {})
    stack.engine.close()
    return x


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_span_begins_with_the_first_block_that_the_model_calls(block: int) -> None:
    stack = Stack(granularity=1, num_warmup_steps=1)
    stack.added = [1.0] * 4
    # Another branch with all blocks, whose flag and input must not be taken for this one's.
    for level, wanted in ((1.0, 4.0), (0.9, 5.0), (0.8, 6.0)):
        stack(ones(50.0), level)
        assert left_out(stack, block, ones(wanted - 3), level)[0, 0, 0].item() == wanted
    flags = [entry[1:] for entry in stack.engine.decisions.entries]
    assert flags == [(step, branch, int(step > 0)) for step in range(3) for branch in (0, 1)]


@pytest.mark.parametrize("block", [1, 3])
def test_a_span_whose_last_block_the_model_leaves_out_is_computed(block: int) -> None:
    stack = Stack(granularity=2, num_warmup_steps=0)
    stack.added = [1.0] * 4
    for level in (1.0, 0.9, 0.8, 0.7):
        assert torch.equal(left_out(stack, block, ones(), level), ones(4.0))
    whole = 0b10 if block == 1 else 0b01
    assert stack.flags == [0, 0 if block == 1 else whole, whole, whole]


def test_a_last_block_left_out_in_one_branch_concerns_no_other() -> None:
    stack = Stack(num_warmup_steps=1)
    for level in (1.0, 0.9, 0.8):
        stack(ones(), level), left_out(stack, 3, ones(), level)
    flags = [entry[1:] for entry in stack.engine.decisions.entries]
    assert flags == [(s, b, int(s > 0 and b == 0)) for s in range(3) for b in (0, 1)]


def test_a_last_block_left_out_of_a_skipped_span_is_an_error_not_a_wrong_picture() -> None:
    stack = Stack(granularity=2, num_warmup_steps=1)
    stack(ones(), 1.0), stack(ones(), 0.9), stack(ones(), 0.8)
    with pytest.raises(RuntimeError, match="left out the last block of span 0 at .* step 3"):
        left_out(stack, 1, ones(), 0.7)
    stack.engine.abandon(RuntimeError())
    assert torch.equal(stack(ones(), 1.0), ones())


def test_a_step_without_blocks_takes_part_in_the_consensus() -> None:
    stack = Stack()
    stack.added = []
    stack(ones(), 1.0)
    assert (stack.engine.consensus.collectives, stack.flags) == (1, [0])


def test_both_streams_are_skipped_and_handed_back_in_the_blocks_order() -> None:
    stack = Stack(blocks=2, num_warmup_steps=1)
    engine = stack.engine
    engine.contracts = [JOINT, JOINT]

    def forward(x: torch.Tensor, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return encoder_hidden_states + 5, x + 1

    for level in (1.0, 0.9):
        x, text = ones(level), ones(10 * level)[:, :2]
        engine.open(level, level, None, WHOLE, x.device)
        for index in range(2):
            text, x = engine.run_block(index, forward, (x,), {"encoder_hidden_states": text})
        engine.close()
    assert stack.flags == [0, 1]
    torch.testing.assert_close(x, ones(2.9))
    torch.testing.assert_close(text, ones(19.0)[:, :2])


@pytest.mark.parametrize(
    ("then", "now", "ratio"),
    [((0.8, 0.9), (0.6, 0.9), 9.0), ((0.8, 0.9), (0.7, 0.8), 1.0), ((0.9, 0.9), (0.6, 0.9), 1.0)],
)
def test_a_lagged_change_grows_with_the_square_of_the_gap_in_noise(
    then: tuple[float, float], now: tuple[float, float], ratio: float
) -> None:
    old = Moments(2.0, 3.0, 100.0, tokens=6, nonfinite=0, overflow=0)
    new = rescaled(old, Sighting(0, *then), *now)
    assert (new.change, new.change_squared) == pytest.approx((2.0 * ratio, 3.0 * ratio**2))
    assert (new.reference, new.tokens) == (100.0, 6)


# ---- several pipeline stages: decisions lag -----------------------------------------------------

PATCHES = (2, 4)
TWO_STAGES = DecisionGroup(stages=2)


def pipelined_step(stack: Stack, x: torch.Tensor, level: float, patched: bool) -> torch.Tensor:
    """Run a step of one pipeline stage, in one piece or patch by patch."""
    if not patched:
        return stack(x, level, Position(0, PATCHES))
    parts = enumerate(x.split(PATCHES, dim=1))
    return torch.cat([stack(p, level, Position(i, PATCHES, True)) for i, p in parts], dim=1)


@pytest.mark.parametrize("lag", [1, 2])
def test_a_pipeline_decides_once_a_step_from_an_earlier_one(lag: int) -> None:
    stack = Stack(group=TWO_STAGES, num_warmup_steps=0, max_consecutive_skips=9)
    assert stack.engine.agreement.lag == 1
    stack.engine.agreement.lag = lag
    for index in range(6):
        pipelined_step(stack, ones(), 1 - index / 10, patched=index > 0)
    # Step 0 had nothing to be measured against; step 1 had.
    assert stack.flags == [int(step > lag) for step in range(6)]
    assert stack.engine.consensus.collectives == 6


@pytest.mark.parametrize(
    ("stage", "granularity", "lag", "measured"),
    [(0, "stack", 1, [6]), (1, "stack", 1, [0]), (0, "block", 2, [6] * 2 + [0] * 2),
     (1, "block", 2, [0] * 2 + [6] * 2), (0, 2, 2, [6, 0]), (1, 3, 2, [0, 6, 6])],
)  # fmt: skip
def test_a_span_is_measured_once_by_the_stage_that_begins_it(
    stage: int, granularity: Any, lag: int, measured: list[int]
) -> None:
    """Of four blocks each of two stages holds two; tokens measured are counted by span."""
    consensus = Consensus(
        DecisionGroup(stages=2, stage=stage),
        backend="gloo",
        timeout_s=60.0,
        config_digest=0,
        block_lists=(BlockList(2, 1),),
    )
    consensus.stages = [[BlockList(2, 1)]] * 2  # one process stands for a stage of two
    spans = span_of_blocks(4, granularity)
    blocks = [BlockInfo(f"blocks.{i}", span, 0.25) for i, span in enumerate(spans)]
    config = CacheConfig(granularity=granularity).resolved()
    engine = CacheEngine(config, consensus, blocks, [BARE] * 2, 2 * stage, DIM)
    posted = []
    consensus.post = lambda header, moments, post=consensus.post: (
        posted.append(moments[:, TOKENS_SLOT].tolist()) or post(header, moments)
    )
    for patch in range(2):
        engine.open(1.0, 1.0, None, Position(patch, (3, 3), True), torch.device("cpu"))
        for index in range(2):
            engine.run_block(index, lambda x: x, (ones()[:, :3],), {})
        engine.close()
    assert (engine.agreement.lag, posted) == (lag, [measured])


@pytest.mark.parametrize(("stages", "patches"), [(2, 2), (4, 4), (2, 4), (3, 2)])
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize(
    ("masked", "decided"),
    [
        # Two skips in a row at most; the first two steps and the last always.
        (False, [1, 4, 7, 10, 11]),
        (True, [1, 4, 7, 10, 11]),
        (True, [1, 4, 7, 11]),
        (True, list(range(1, 12))),
    ],
    ids=["gate", "mask", "mask, last alone", "mask of all"],
)
def test_staggered_stages_act_on_the_next_decision_where_the_first_stage_is_at_it(
    masked: bool, decided: list[int], stages: int, patches: int, stagger: bool
) -> None:
    """The flags of a stage and patch are those of the first stage, a step earlier from its turn."""
    steps = 12
    # Step 0 has no patches.
    levels = [1 - index / steps for index in range(steps)]
    schedule = Schedule(torch.tensor(levels), tuple(Step(x, x) for x in levels))

    def computed(stage: int) -> dict[int, list[int]]:
        """Return the steps at which a stage computes, by patch."""
        consensus = Consensus(
            DecisionGroup(stages=stages, stage=stage),
            backend="gloo",
            timeout_s=60.0,
            config_digest=0,
            block_lists=(BlockList(1, 1),),
        )
        consensus.stages = [[BlockList(1, 1)]] * stages
        # What the first stage measures: nothing has changed.
        consensus.wait = lambda ticket: [[0, 0, 2**MOMENTS_FRACTION, 6, 0, 0]]
        mask = [int(step in (0, *decided)) for step in range(steps)] if masked else None
        options = {"max_consecutive_skips": 2, "steps_mask": mask, "stagger_stages": stagger}
        config = CacheConfig(forecaster="reuse", **options).resolved()
        blocks = [BlockInfo(f"blocks.{i}", 0, 1 / stages) for i in range(stages)]
        engine = CacheEngine(config, consensus, blocks, [BARE], stage, DIM)
        ran: dict[int, list[int]] = {patch: [] for patch in range(patches)}
        for step, level in enumerate(levels):
            for patch in range(patches) if step else [0]:
                position = Position(patch, (3,) * patches, patched=step > 0)
                tokens = 3 if step else 3 * patches
                device = torch.device("cpu")
                engine.open(level, level, None, position, device, schedule)

                def forward(x: torch.Tensor, step: int = step, patch: int = patch) -> torch.Tensor:
                    ran[patch].append(step)
                    return x

                engine.run_block(0, forward, (torch.ones(1, tokens, DIM),), {})
                engine.close()
        assert engine.statistics()["collectives"] == steps
        return ran

    for stage in range(stages):
        for patch, ran in computed(stage).items():
            ahead = stagger and stage + patch >= patches
            # The gate is not asked at step 1 and the last. In a mask, stages are ahead of those,
            # too, but for the second of two computed steps at the end.
            always = {1, steps - 1} if not masked else {steps - 1} & {x + 1 for x in decided}
            wanted = {step - ahead for step in decided} | always
            assert [step for step in ran if step] == sorted(wanted - {0}), (stage, patch)


def test_synchronous_pipeline_steps_are_computed() -> None:
    stack = Stack(group=TWO_STAGES, num_warmup_steps=0)
    for index in range(6):
        pipelined_step(stack, ones(), 1 - index / 10, patched=index == 5)
    assert stack.flags == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("patched_from", [1, 3])
def test_a_skipped_patch_is_forecast_from_its_own_anchor(patched_from: int) -> None:
    stack = Stack(group=TWO_STAGES, num_warmup_steps=3)
    x = torch.arange(float(TOKENS * DIM)).reshape(1, TOKENS, DIM)
    stack.added = [1.0] * 4
    for index in range(3):
        pipelined_step(stack, x, 1 - index / 10, patched=index >= patched_from)
    stack.added = [100.0] * 4
    assert torch.equal(pipelined_step(stack, x + 7, 0.7, patched=True), x + 11)
    assert stack.flags == [0, 0, 0, 1]


def test_a_pipeline_computes_at_the_first_decision_that_knows_of_a_nan() -> None:
    stack = Stack(group=TWO_STAGES, num_warmup_steps=0, max_consecutive_skips=99)
    for index in range(9):
        x = ones(torch.nan if index == 4 else 1.0)
        pipelined_step(stack, x, 1 - index / 10, patched=index > 0)
    assert stack.flags == [0, 0, 1, 1, 1, 0, 1, 1, 1]
    assert stack.engine.statistics()["nonfinite_steps"] == 1


# ---- a tiny FLUX in diffusers' pipeline -------------------------------------------------------


class Flux:
    """A tiny FLUX pipeline that repeats its generation."""

    def __init__(self, seed: int = 0):
        self.pipe: FluxPipeline
        self.pipe, self.call = tiny_flux(seed)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer

    def __call__(self, **changes: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        call = {**self.call, "num_inference_steps": STEPS, **changes, "generator": generator}
        return self.pipe(**call).images

    def cache(self, scheduler: bool = True, **options: Any) -> Flux:
        options = {"cache_ratio_threshold": EVER, **options}
        plan = self.pipe.scheduler if scheduler else None
        apply_cache_on_transformer(self.transformer, scheduler=plan, **options)
        return self

    @property
    def engine(self) -> CacheEngine:
        return hook_on(self.transformer).engine

    @property
    def flags(self) -> list[int]:
        return [flags for *_, flags in self.engine.decisions.entries]


@pytest.fixture
def flux() -> Flux:
    return Flux()


@pytest.fixture(scope="module")
def uncached() -> torch.Tensor:
    return Flux()()


GUIDED: dict[str, Any] = {
    "true_cfg_scale": 2.0,
    "negative_prompt_embeds": torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32),
    "negative_pooled_prompt_embeds": torch.linspace(1, -1, 32)[None],
}


@every_granularity
@every_forecaster
def test_threshold_zero_is_bit_identical_to_no_cache(
    flux: Flux, uncached: torch.Tensor, granularity: Any, forecaster: str
) -> None:
    flux.cache(cache_ratio_threshold=0, granularity=granularity, forecaster=forecaster)
    assert torch.equal(flux(), uncached)
    assert flux.flags == [0] * STEPS


@every_granularity
@every_forecaster
def test_a_high_threshold_skips_changes_the_output_and_repeats_to_the_bit(
    flux: Flux, uncached: torch.Tensor, granularity: Any, forecaster: str
) -> None:
    flux.cache(granularity=granularity, forecaster=forecaster)
    first, decided = flux(), flux.flags
    assert any(decided)
    assert (first.shape, first.dtype, first.device) == (
        uncached.shape, uncached.dtype, uncached.device,
    )  # fmt: skip
    assert first.isfinite().all() and not torch.equal(first, uncached)
    assert torch.equal(flux(), first)
    assert flux.flags == decided
    assert get_cache_statistics(flux.transformer)["generations"] == 2


def test_after_removal_the_output_is_the_uncached_one(flux: Flux, uncached: torch.Tensor) -> None:
    flux.cache()()
    remove_cache(flux.transformer)
    assert torch.equal(flux(), uncached)


def test_bfloat16_stays_bfloat16_and_skips(flux: Flux) -> None:
    flux.pipe.to(torch.bfloat16)
    embeddings = {k: v.bfloat16() for k, v in flux.call.items() if k.endswith("embeds")}
    wanted = flux(**embeddings)
    flux.cache(cache_ratio_threshold=0)
    assert torch.equal(flux(**embeddings), wanted)
    remove_cache(flux.transformer)
    found = flux.cache()(**embeddings)
    assert (found.dtype, bool(found.isfinite().all())) == (torch.bfloat16, True)
    assert any(flux.flags) and len(flux.flags) == STEPS


@every_granularity
@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
@pytest.mark.parametrize("in_a_row", [1, 3, 99])
def test_warm_up_last_step_and_longest_run_are_honoured(
    flux: Flux, granularity: Any, warmup: int, in_a_row: int
) -> None:
    flux.cache(granularity=granularity, num_warmup_steps=warmup, max_consecutive_skips=in_a_row)()
    spans = {"stack": 1, "block": 6}.get(granularity, granularity)
    wanted = []
    for span in range(spans):
        run, skipped = 0, []
        for step in range(STEPS):
            # The first span is measured before it is decided, the others one step later.
            measured = step >= (1 if span == 0 else 2)
            skip = measured and warmup <= step < STEPS - 1 and run < in_a_row
            run = run + 1 if skip else 0
            skipped.append(skip)
        wanted.append(skipped)
    found = [[bool(flags >> span & 1) for flags in flux.flags] for span in range(spans)]
    assert found == wanted


@pytest.mark.parametrize(
    ("options", "last"), [({"scheduler": True}, 0), ({"num_steps": STEPS}, 0), ({}, 1)]
)
def test_the_last_step_is_computed_where_the_number_of_steps_is_known(
    flux: Flux, options: dict[str, Any], last: int
) -> None:
    flux.cache(**{"scheduler": False, "max_consecutive_skips": 99, **options})()
    assert flux.flags == [0, 0, *[1] * (STEPS - 3), last]


def test_each_generation_goes_by_its_own_number_of_steps(flux: Flux) -> None:
    flux.cache(max_consecutive_skips=99)
    for steps in (STEPS, 5, 11):
        flux(num_inference_steps=steps)
        assert flux.flags == [0, 0, *[1] * (steps - 3), 0]


@pytest.mark.parametrize("scheduler", [True, False])
def test_one_step_generations_are_generations(
    flux: Flux, uncached: torch.Tensor, scheduler: bool
) -> None:
    flux.cache(scheduler=scheduler, num_warmup_steps=0)
    first = flux(num_inference_steps=1)
    assert torch.equal(flux(num_inference_steps=1), first)
    statistics = get_cache_statistics(flux.transformer)
    assert (statistics["generations"], statistics["block_approx_ratio"]) == (2, 0)


def nan_after_step(step: int, mended: bool) -> Callable[..., dict[str, Any]]:
    """Return a callback that breaks the latents after `step` and may mend them a step later."""
    kept = {}

    def callback(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            kept["latents"] = given["latents"]
            return {"latents": torch.full_like(given["latents"], torch.nan)}
        return {"latents": kept["latents"]} if mended and index == step + 1 else {}

    return callback


@every_granularity
@every_forecaster
def test_a_nan_is_computed_through_counted_said_once_and_forgotten(
    flux: Flux, granularity: Any, forecaster: str, caplog: pytest.LogCaptureFixture
) -> None:
    flux.cache(granularity=granularity, forecaster=forecaster, max_consecutive_skips=99)
    healthy, decided = flux(), flux.flags
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"):
        for _ in range(2):
            found = flux(callback_on_step_end=nan_after_step(2, mended=True))
    # Step 3 sees the NaN, step 4 is measured against it; later spans learn one step later still.
    broken = (3, 4) if granularity == "stack" else (3, 4, 5)
    assert flux.flags == [0 if step in broken else f for step, f in enumerate(decided)]
    assert flux.flags[6] and decided[3]
    assert get_cache_statistics(flux.transformer)["nonfinite_steps"] == 2 * len(broken)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nonfinite_steps" in caplog.text
    assert found.isfinite().all()
    assert torch.equal(flux(), healthy)


def test_while_numbers_stay_nan_everything_is_computed(flux: Flux) -> None:
    flux.cache()(callback_on_step_end=nan_after_step(2, mended=False))
    assert flux.flags == [0, 0, 1, *[0] * (STEPS - 3)]
    assert get_cache_statistics(flux.transformer)["nonfinite_steps"] == STEPS - 3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("scheduler", [True, False])
@pytest.mark.parametrize("place", ["norm_out", "transformer_blocks.1.attn", "x_embedder"])
@pytest.mark.parametrize("step", [0, 3])
def test_an_exception_leaves_the_next_generation_as_a_fresh_one(
    error: BaseException, scheduler: bool, place: str, step: int
) -> None:
    # Compute every step, so that each step reaches every place.
    options = {"scheduler": scheduler, "num_warmup_steps": 4}
    fresh = Flux().cache(**options)
    wanted, flux, calls = fresh(), Flux().cache(**options), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == step + 1:
            raise error

    handle = flux.transformer.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=str(error)):
        flux()
    assert flux.engine.call is None
    handle.remove()
    assert torch.equal(flux(), wanted)
    assert flux.flags == fresh.flags
    assert {generation for generation, *_ in flux.engine.decisions.entries} == {1}


@pytest.mark.parametrize("scheduler", [True, False])
@pytest.mark.parametrize("step", [0, 3, STEPS - 2])
def test_after_an_interrupted_generation_the_next_one_is_as_a_fresh_one(
    scheduler: bool, step: int
) -> None:
    fresh = Flux().cache(scheduler=scheduler)
    wanted, flux = fresh(), Flux().cache(scheduler=scheduler)

    def interrupt(pipe: Any, index: int, timestep: Any, given: Any) -> dict[str, Any]:
        pipe._interrupt = index == step
        return {}

    flux(callback_on_step_end=interrupt)
    assert len(flux.flags) == step + 1
    assert torch.equal(flux(), wanted)
    assert flux.flags == fresh.flags


def test_another_size_in_between_changes_nothing(flux: Flux) -> None:
    flux.cache()
    first, other = flux(), flux(height=64, width=96)
    assert other.shape != first.shape
    assert torch.equal(flux(), first)
    assert get_cache_statistics(flux.transformer)["generations"] == 3


def test_guidance_with_threshold_zero_is_bit_identical_to_no_cache(flux: Flux) -> None:
    wanted = flux(**GUIDED)
    flux.cache(cache_ratio_threshold=0)
    assert torch.equal(flux(**GUIDED), wanted)
    entries = flux.engine.decisions.entries
    assert entries == [(0, step, branch, 0) for step in range(STEPS) for branch in (0, 1)]


def test_guidance_keeps_an_anchor_for_each_of_its_two_calls(flux: Flux) -> None:
    flux.cache(forecaster="reuse")
    guided = flux(**GUIDED)
    one, other = (flux.engine.branches[branch].memories[0][-1].anchors[0] for branch in (0, 1))
    assert torch.equal(one.inputs.hidden_states, other.inputs.hidden_states)
    assert not torch.equal(one.residual.hidden_states, other.residual.hidden_states)
    statistics = get_cache_statistics(flux.transformer)
    assert (statistics["steps"], statistics["collectives"]) == (STEPS, 2 * STEPS)
    assert statistics["block_approx_ratio"] > 0
    assert torch.equal(flux(**GUIDED), guided)


@every_granularity
def test_what_the_model_adds_between_blocks_is_counted_once(flux: Flux, granularity: Any) -> None:
    transformer = flux.cache(granularity=granularity, forecaster="reuse").transformer
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 16, generator=generator)
    old, new = (torch.randn(6, 1, 16, 32, generator=generator) for _ in range(2))
    last: dict[str, torch.Tensor] = {}
    transformer.norm_out.register_forward_pre_hook(lambda _, args: last.update(x=args[0]))

    def step(level: float, samples: torch.Tensor) -> torch.Tensor:
        transformer(
            hidden_states=latents,
            encoder_hidden_states=flux.call["prompt_embeds"],
            pooled_projections=flux.call["pooled_prompt_embeds"],
            timestep=torch.tensor([level]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            controlnet_block_samples=list(samples[:2]),
            controlnet_single_block_samples=list(samples[2:]),
        )
        return last["x"]

    step(0.9, old)
    computed = step(0.8, old)
    skipped = step(0.7, new)
    spans = span_of_blocks(6, granularity)
    assert flux.flags == [0, 0, 2 ** (spans[-1] + 1) - 1]
    # Within a span the anchor's residual holds the old additions; after it come the new ones.
    ends = [i for i in range(6) if i == 5 or spans[i + 1] != spans[i]]
    torch.testing.assert_close(skipped, computed + (new - old)[ends].sum(0))


# ---- statistics -------------------------------------------------------------------------------

KEYS = [
    "use_cache", "steps", "generations", "block_approx_ratio", "spatial_approx_ratio", "blocks",
    "estimated_flops_saved_ratio", "collectives", "collectives_per_step", "consensus_wait_s",
    "cache_bytes", "audits", "false_skip_rate", "false_skip_interval", "nonfinite_steps",
    "decisions_digest",
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
    for name in set(KEYS) - {"use_cache", "blocks", "decisions_digest", "cache_bytes"}:
        assert not found[name], name
    assert not any(any(row.values()) for row in found["blocks"].values())
    assert found["decisions_digest"] == digest
    assert torch.equal(flux(), wanted)
    found, expected = (get_cache_statistics(f.transformer) for f in (flux, reference))
    assert (found["steps"], found["generations"], found["collectives"]) == (STEPS, 1, STEPS)
    assert found["decisions_digest"] == expected["decisions_digest"] != digest


@pytest.mark.parametrize("scheduler", [True, False])
def test_comparing_decisions_changes_nothing_on_one_process(flux: Flux, scheduler: bool) -> None:
    plain = Flux().cache(scheduler=scheduler)
    wanted = plain()
    flux.cache(scheduler=scheduler, verify_consensus=True)
    assert torch.equal(flux(), wanted) and torch.equal(flux(), wanted)
    remove_cache(flux.transformer)

"""Forecasts of the whole output: the arithmetic, a pipeline's patches, and real models.

Layers: forecasters on plain tensors; the engine on a forward pass that is arithmetic,
whole and in a pipeline's patches; tiny FLUX, SD3 and PixArt in diffusers' own pipelines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.calibrations import even_levels, fitted_on
from support.loops import SCHEDULER
from support.stack import WholeForward, config_of
from torch import nn

from diffusers_adapters.tiny import TINY_PIPELINES
from diffusers_adapters.tiny.flux import tiny_flux
from xfuser_fastcache import (
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.artifacts.calibration import Cell, Fitted, TrajectoryCorrection
from xfuser_fastcache.consensus.topology import DecisionGroup, Position
from xfuser_fastcache.forecasters.output import OutputForecaster
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.measurements.moments import Reference
from xfuser_fastcache.models.forward_layout import ForwardContract
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory

STEPS = 8
MASK = [1, 1, 1, 0, 1, 0, 0, 1]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# ---- the arithmetic of a forecast ---------------------------------------------------------------

LEVELS = even_levels(STEPS)
CHANNELS, HEIGHT, WIDTH = 4, 3, 2


def at(step: float) -> float:
    """Return the noise level of a step; between two of the plan, for what is not of it."""
    return float(np.interp(step, range(STEPS), LEVELS))


def latents(seed: int, dtype: torch.dtype) -> Streams:
    x = random(1, CHANNELS, HEIGHT, WIDTH, seed=seed, dtype=dtype)
    return ForwardContract().read((x,), {})


def remembered(
    steps: tuple[float, ...],
    picture: bool,
    dtype: torch.dtype,
    forecaster: OutputForecaster | None = None,
) -> Memory:
    """Return the memory of random steps, in order; a picture's output also predicts variances."""
    forecaster, memory = forecaster or OutputForecaster(), Memory()
    for seed, step in enumerate(steps):
        channels = 2 * CHANNELS if picture else CHANNELS
        output = random(1, channels, HEIGHT, WIDTH, seed=seed + 50, dtype=dtype)
        output = output if picture else output.flatten(2).transpose(1, 2)
        text = random(1, 2, 3, seed=seed + 70, dtype=dtype)
        inputs = latents(seed, dtype)
        kept = forecaster.kept(inputs, ForwardContract().unpack((output, text)))
        reference = Reference.of(inputs.hidden_states)
        memory = forecaster.update(memory, Anchor(at(step), inputs, kept, reference))
    return memory


def corrected(steps: tuple[int, ...] = (1, 3), step: int = 5) -> Fitted:
    """Return a calibration with weights in one cell alone: that of `step` after these anchors."""
    spacing = steps[-1] - steps[-2] if len(steps) > 1 else 0
    cell = Cell(step, step - steps[-1] - 1, spacing)
    fitted = fitted_on(LEVELS)
    fitted.weights[cell] = (0.3, -0.2, 0.05, 0.1)
    return fitted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [(1, 3), (3,)], ids=["two anchors", "one anchor"])
@pytest.mark.parametrize("picture", [True, False], ids=["picture", "tokens"])
def test_corrections_are_those_of_the_formula(
    picture: bool, steps: tuple[int, ...], dtype: torch.dtype
) -> None:
    memory, x = remembered(steps, picture, dtype), latents(9, dtype)
    plain = OutputForecaster().forecast(memory, x, at(5))
    found = OutputForecaster(corrected(steps)).forecast(memory, x, at(5))

    def tokens(output: torch.Tensor) -> torch.Tensor:
        """The output as `(batch, tokens, channels)`."""
        return (output.transpose(2, 3).flatten(1, 2) if picture else output).double()

    now, before = memory.anchors[0], memory.anchors[-1]
    f0, f1 = tokens(now.residual.hidden_states), tokens(before.residual.hidden_states)
    wanted = f0 + (f0 - f1)  # from step 3 to 5 is as far as from 1 to 3
    close = {torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(tokens(plain.hidden_states), wanted, rtol=close, atol=close)
    f0, f1 = f0[..., :CHANNELS], f1[..., :CHANNELS]
    x0, x1 = now.inputs.hidden_states.double(), x.hidden_states.double()
    wanted[..., :CHANNELS] += 0.3 * (f0 - f1) - 0.2 * (x1 - x0) + 0.05 * f0 + 0.1 * x1
    torch.testing.assert_close(tokens(found.hidden_states), wanted, rtol=close, atol=close)
    assert found.hidden_states.dtype == dtype
    # Neither variances nor text are touched, to the bit.
    variances = (tokens(streams.hidden_states)[..., CHANNELS:] for streams in (found, plain))
    assert torch.equal(*variances)
    assert torch.equal(found.encoder_hidden_states, plain.encoder_hidden_states)


def test_a_last_stage_whose_latents_are_not_known_corrects_nothing() -> None:
    unknown = Streams(torch.empty(1, 0, 0, dtype=torch.float64))
    memory, x = remembered((1, 3), True, torch.float64), latents(9, torch.float64)
    blind = replace(memory, anchors=(replace(memory.anchors[0], inputs=unknown), memory.anchors[1]))
    plain = OutputForecaster().forecast(memory, x, at(5)).hidden_states
    for held, given in ((memory, unknown), (blind, x)):
        found = OutputForecaster(corrected()).forecast(held, given, at(5)).hidden_states
        assert torch.equal(found, plain)


@pytest.mark.parametrize("steps", [(0, 1, 3), (1, 3), (3,)], ids=["three", "two", "one anchor"])
def test_corrections_for_a_mask_look_at_three_anchors(
    steps: tuple[int, ...],
) -> None:
    steering = np.zeros((STEPS, 5), np.float32)
    steering[5] = (0.3, -0.2, 0.05, 0.1, 0.6)
    mask = [int(step in (0, 1, 3)) for step in range(STEPS)]
    forecaster = OutputForecaster(corrected(), TrajectoryCorrection(mask, steering))
    memory, x = remembered(steps, False, torch.float64, forecaster), latents(9, torch.float64)
    found = forecaster.forecast(memory, x, at(5)).hidden_states
    plain = OutputForecaster().forecast(memory, x, at(5)).hidden_states
    outputs = [anchor.residual.hidden_states for anchor in memory.anchors]
    assert len(outputs) == len(steps)
    f0, f1, f2 = outputs + [outputs[-1]] * (3 - len(outputs))
    x0, x1 = memory.anchors[0].inputs.hidden_states, x.hidden_states
    wanted = plain + 0.3 * (f0 - f1) - 0.2 * (x1 - x0) + 0.05 * f0 + 0.1 * x1
    wanted = wanted + 0.6 * (f1 - f2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [(0, 1, 3), (0, 3)], ids=["three", "two anchors"])
def test_a_computed_step_of_a_mask_is_corrected_by_what_it_says(
    steps: tuple[int, ...],
) -> None:
    weights = random(STEPS, 5).numpy()
    weights[3] = (0.3, -0.2, 0.05, 0.1, 0.6)
    mask = [int(step in (0, 1, 3)) for step in range(STEPS)]
    forecaster = OutputForecaster(corrected(), TrajectoryCorrection(mask, weights))
    memory = remembered(steps, False, torch.float64, forecaster)
    found = forecaster.correct_computed(memory)
    assert found is not None
    anchors = memory.anchors
    outputs = [anchor.residual.hidden_states for anchor in anchors]
    f0, f1, f2 = outputs + [outputs[-1]] * (3 - len(outputs))
    x0, x1 = (anchor.inputs.hidden_states for anchor in anchors[:2])
    wanted = 0.3 * (f0 - f1) - 0.2 * (x0 - x1) + 0.05 * f0 + 0.1 * x0 + 0.6 * (f1 - f2)
    torch.testing.assert_close(found.hidden_states, f0 + wanted, rtol=1e-6, atol=1e-6)
    # What is remembered stays what was computed, and the text is not touched.
    assert anchors[0].residual.hidden_states is f0
    assert torch.equal(found.encoder_hidden_states, anchors[0].residual.encoder_hidden_states)


def test_a_computed_step_puts_out_what_was_computed_without_a_masks_corrections() -> None:
    mask = [int(step in (0, 1, 3)) for step in range(STEPS)]
    blank = TrajectoryCorrection(mask, np.zeros((STEPS, 5), np.float32))
    full = TrajectoryCorrection(mask, np.ones((STEPS, 5), np.float32))
    for steering, steps in ((None, (0, 1, 3)), (blank, (0, 1, 3)), (full, (3,)), (full, (0, 1.5))):
        forecaster = OutputForecaster(corrected(), steering)
        assert (
            forecaster.correct_computed(remembered(steps, False, torch.float64, forecaster)) is None
        )


def by_branch(*weights: tuple[float, ...]) -> TrajectoryCorrection:
    """Corrections of step 5 for a mask: common, without guidance, and with it."""
    tables = np.zeros((STEPS, 3, 5), np.float32)
    tables[5] = weights
    return TrajectoryCorrection(
        [int(step in (0, 1, 3)) for step in range(STEPS)], tables[:, 0], tables[:, 1:]
    )


COMMON, WITHOUT, WITH = (0.1,) * 5, (0.3, -0.2, 0.05, 0.1, 0.6), (0.7, -0.4, 0.2, 0.3, -0.1)


@pytest.mark.parametrize("picture", [True, False], ids=["picture", "tokens"])
def test_pictures_without_and_with_guidance_have_weights_of_their_own(picture: bool) -> None:
    """Told by a batch whose halves hold the same latents, picture by picture, or by the rank."""
    x = latents(9, torch.float64).hidden_states
    moved = x + 1.0
    steering = by_branch(COMMON, WITHOUT, WITH)
    one = remembered((0, 1, 3), picture, torch.float64, OutputForecaster(None, steering))

    def four(streams: Streams) -> Streams:
        return streams.map(lambda x: torch.cat([x] * 4))

    anchors = [replace(a, inputs=four(a.inputs), residual=four(a.residual)) for a in one.anchors]
    memory = replace(one, anchors=tuple(anchors))

    def forecast(
        rows: list[torch.Tensor], steering: TrajectoryCorrection, branch: int | None = None
    ) -> Any:
        forecaster = OutputForecaster(corrected(), steering, branch)
        return forecaster.forecast(memory, Streams(torch.cat(rows)), at(5)).hidden_states

    alike = {w: forecast([x, moved, x, moved], by_branch(w, w, w)) for w in (COMMON, WITHOUT, WITH)}
    both = forecast([x, moved, x, moved], steering)
    wanted = torch.cat([alike[WITHOUT][:2], alike[WITH][2:]])
    torch.testing.assert_close(both, wanted, rtol=1e-6, atol=1e-6)
    # One picture is drawn with guidance, the other is two pictures.
    mixed = forecast([x, moved, x, moved + 1], steering)
    alone = forecast([x, moved, x, moved + 1], by_branch(COMMON, COMMON, COMMON))
    torch.testing.assert_close(mixed[[0, 2]], wanted[[0, 2]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed[[1, 3]], alone[[1, 3]], rtol=1e-6, atol=1e-6)
    for branch, own in enumerate((WITHOUT, WITH)):
        found = forecast([x, moved, x, moved], steering, branch)
        torch.testing.assert_close(found, alike[own], rtol=1e-6, atol=1e-6)


def test_a_stage_ahead_in_a_mask_takes_the_corrections_of_the_next_step() -> None:
    mask = [int(step in (0, 4, 5)) for step in range(STEPS)]
    weights = random(STEPS, 5).numpy()
    forecaster = OutputForecaster(corrected(), TrajectoryCorrection(mask, weights))
    x = latents(9, torch.float64)

    def row(
        memory: Memory, plain: Streams, found: Streams | None, given: Streams, computed: bool
    ) -> int | None:
        """The step whose weights a forecast or a computed step took."""
        if found is None or torch.equal(found.hidden_states, plain.hidden_states):
            return None
        terms = forecaster.terms(memory, given, computed)
        for step in range(STEPS):
            wanted = forecaster.corrected(plain, terms, weights[step].tolist())
            if torch.equal(wanted.hidden_states, found.hidden_states):
                return step
        raise AssertionError("no step's weights")

    forecasts = {
        ((0, 4, 5), 6): 6,
        ((0, 3, 4), 5): 6,  # the stage was ahead at 3 and 4
        ((0, 3, 4), 6): 7,
        ((0, 3), 4): None,  # at the next step the mask computes
        ((0, STEPS - 2), STEPS - 1): None,
    }
    for (steps, now), wanted in forecasts.items():
        memory = remembered(steps, False, torch.float64, forecaster)
        plain = OutputForecaster().forecast(memory, x, at(now))
        assert row(memory, plain, forecaster.forecast(memory, x, at(now)), x, False) == wanted
    computed = {(0, 4): 4, (0, 4, 5): 5, (0, 3): 4, (0, 3, 4): 5, (0, 2): None, (3, 4, 5): None}
    for steps, wanted in computed.items():
        memory = remembered(steps, False, torch.float64, forecaster)
        newest = memory.anchors[0]
        found = forecaster.correct_computed(memory)
        assert row(memory, newest.residual, found, newest.inputs, True) == wanted


@pytest.mark.parametrize(
    ("steps", "now"),
    [((1, 3), 4), ((2, 3), 5), ((3,), 5), ((0, 3), 7), ((1, 3), 4.9), ((1, 3.1), 5)],
    ids=["lag", "spacing", "one anchor", "out of reach", "step not planned", "anchor not planned"],
)
def test_outside_of_its_cells_a_calibration_corrects_nothing(
    steps: tuple[float, ...], now: float
) -> None:
    memory, x = remembered(steps, True, torch.float64), latents(9, torch.float64)
    plain = OutputForecaster().forecast(memory, x, at(now))
    found = OutputForecaster(corrected()).forecast(memory, x, at(now))
    assert torch.equal(found.hidden_states, plain.hidden_states)


# ---- the engine on a forward pass that is arithmetic --------------------------------------------


class Forward:
    """A forward pass whose output is linear in the noise level, run as a transformer's hook does.

    Args:
        stages: pipeline stages; this is the first.
        **options: of the config; it computes what `steps_mask` says.
    """

    def __init__(self, stages: int = 1, **options: Any):
        options = {"steps_mask": [1, 1, *[0] * (STEPS - 2)], "num_steps": STEPS, **options}
        config = config_of(forecaster="output", **options)
        self.run = WholeForward(config, CHANNELS, DecisionGroup(stages=stages))
        self.engine = self.run.engine
        self.stages = stages
        self.runs = 0

    def __call__(
        self, x: torch.Tensor, text: torch.Tensor, level: float, position: Position
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def forward(x: torch.Tensor) -> Any:
            self.runs += 1
            return ((3 * x - 2 * level * x.square(), text * level),)

        return self.run(forward, x, level, position=position, stages=self.stages)[0]


@pytest.mark.parametrize(
    ("shape", "dim", "patches"),
    [((1, 6, CHANNELS), 1, (2, 4)), ((1, CHANNELS, 6, 4), 2, (2, 4)), ((2, 6, 4), 1, (1, 2, 3))],
    ids=["tokens", "rows of a picture", "three patches"],
)
def test_a_pipelines_patches_are_forecast_from_their_part_of_a_synchronous_step(
    shape: tuple[int, ...], dim: int, patches: tuple[int, ...]
) -> None:
    """Patches count tokens; of the picture each token has 2 x 2 pixels."""
    x, text = random(*shape, seed=1), random(1, 2, 3)
    run, last = Forward(stages=2), STEPS - 1
    for step in range(2):
        run(x, text, LEVELS[step], Position(0, patches))
    for step in range(2, STEPS):
        lengths = [n * shape[dim] // sum(patches) for n in patches]
        for patch, part in enumerate(x.split(lengths, dim=dim)):
            level = LEVELS[step]
            # A skipped step looks at no latents.
            found = run(0 * part, text, level, Position(patch, patches, patched=True))
            wanted = 3 * part - 2 * level * part.square()
            torch.testing.assert_close(found[0], wanted)
            torch.testing.assert_close(found[1], text * level)
            assert found[0].is_contiguous()
    assert run.runs == 2 and run.engine.decisions.entries[last] == (0, last, 0, 1)


def test_an_anchor_outlives_what_a_callback_writes_into_the_latents() -> None:
    run, x, text = Forward(), random(1, 6, CHANNELS), random(1, 2, 3)
    run(x, text, LEVELS[0], Position())
    (held,) = run.engine.branches[0].memories[0][-1].anchors
    wanted = x.clone()
    x.fill_(7.0)
    assert torch.equal(held.inputs.hidden_states, wanted)


# ---- real pipelines -----------------------------------------------------------------------------


class Model:
    """A tiny pipeline that repeats its generation, and notes what its transformer runs."""

    def __init__(self, family: str):
        self.pipe, self.call = TINY_PIPELINES[family]()
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer: nn.Module = self.pipe.transformer
        self.calls: list[list[str]] = []
        self.outputs: list[torch.Tensor] = []

    def __call__(self, **changes: Any) -> torch.Tensor:
        call = {**self.call, "num_inference_steps": STEPS, **changes}
        return self.pipe(**{**call, "generator": torch.Generator().manual_seed(1)}).images

    def cache(self, **options: Any) -> Model:
        apply_cache_on_transformer(
            self.transformer, scheduler=self.pipe.scheduler, forecaster="output", **options
        )
        return self

    def watched(self, **changes: Any) -> torch.Tensor:
        """Generate; note the modules that each forward pass calls, and what it puts out."""
        self.calls, self.outputs = [], []

        def note(name: str) -> Any:
            return lambda *_: self.calls[-1].append(name)

        handles = [
            child.register_forward_pre_hook(note(name))
            for name, child in self.transformer.named_modules()
            if name
        ]
        handles += [
            self.transformer.register_forward_pre_hook(lambda *_: self.calls.append([])),
            self.transformer.register_forward_hook(lambda *_: self.outputs.append(_[2][0])),
        ]
        found = self(**changes)
        for handle in handles:
            handle.remove()
        return found


every_family = pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])


@every_family
def test_threshold_zero_is_bit_identical_to_no_cache(family: str) -> None:
    model = Model(family)
    wanted = model()
    assert torch.equal(model.cache(cache_ratio_threshold=0)(), wanted)
    assert get_cache_statistics(model.transformer)["block_approx_ratio"] == 0


def attributes(module: nn.Module) -> dict[str, dict[str, int]]:
    """Return every submodule's own attributes, by identity."""
    return {
        name: {key: id(value) for key, value in vars(child).items()}
        for name, child in module.named_modules()
    }


# Latents, the output and an energy a token; with guidance of two pictures.
ANCHOR_NUMBERS = {
    "flux": 64 * (16 + 16 + 1),
    "sd3": 2 * 64 * (4 + 4 + 1),
    "pixart": 2 * 64 * (4 + 8 + 1),
}


@every_family
def test_a_steps_mask_computes_its_steps_and_runs_no_layer_at_the_others(family: str) -> None:
    model = Model(family)
    uncached = model.watched()
    every_call, before = model.calls, attributes(model.transformer)
    shapes = [(x.shape, x.dtype) for x in model.outputs]
    model.cache(steps_mask=MASK)
    first = model.watched()
    assert model.calls == [c if kept else [] for c, kept in zip(every_call, MASK, strict=True)]
    assert [(x.shape, x.dtype) for x in model.outputs] == shapes
    assert all(x.is_contiguous() for x, m in zip(model.outputs, MASK, strict=True) if not m)
    assert first.isfinite().all() and not torch.equal(first, uncached)
    statistics = get_cache_statistics(model.transformer)
    assert statistics["block_approx_ratio"] == MASK.count(0) / STEPS
    assert statistics["cache_bytes"] == ANCHOR_NUMBERS[family] * 2 * 4
    assert torch.equal(model(), first)
    remove_cache(model.transformer)
    assert attributes(model.transformer) == before
    assert torch.equal(model(), uncached)


@every_family
def test_a_skipped_steps_output_is_extrapolated_in_the_schedulers_noise_levels(
    family: str,
) -> None:
    model = Model(family).cache(steps_mask=MASK)
    model.watched()
    levels = [step.noise_level for step in adapter_of(model.transformer).plan(model.pipe.scheduler)]
    assert get_cache_statistics(model.transformer)["nonfinite_steps"] == 0
    for step in (step for step, computed in enumerate(MASK) if not computed):
        newest, before = [s for s in range(step) if MASK[s]][:-3:-1]
        w = (levels[step] - levels[newest]) / (levels[newest] - levels[before])
        f0, f1 = model.outputs[newest], model.outputs[before]
        torch.testing.assert_close(model.outputs[step], f0 + w * (f0 - f1), rtol=1e-4, atol=1e-4)


def test_a_high_threshold_skips_by_the_gate_and_bf16_stays_bf16() -> None:
    model = Model("flux")
    model.pipe.to(torch.bfloat16)
    model.call |= {k: v.bfloat16() for k, v in model.call.items() if k.endswith("embeds")}
    wanted = model()
    found = model.cache(cache_ratio_threshold=1e6, max_consecutive_skips=2)()
    flags = [flags for *_, flags in hook_on(model.transformer).engine.decisions.entries]
    assert flags == [0, 0, 1, 1, 0, 1, 1, 0]
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert not torch.equal(found, wanted)


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by order"])
def test_branches_forecast_as_each_does_alone(named: bool) -> None:
    """Two trajectories through one transformer, each with a text of its own."""

    def run(*texts: int) -> list[list[torch.Tensor]]:
        transformer = tiny_flux()[0].transformer
        options = {"scheduler": SCHEDULER, "forecaster": "output", "steps_mask": MASK}
        apply_cache_on_transformer(transformer, **options)
        SCHEDULER.set_timesteps(sigmas=LEVELS.tolist())
        x = {text: random(1, 16, 16, seed=text, dtype=torch.float32) for text in texts}
        found: dict[int, list[torch.Tensor]] = {text: [] for text in texts}
        for step, level in enumerate(LEVELS.tolist()):
            # A name is what a branch goes by, in whatever order they come.
            for text in texts[::-1] if named and step % 2 else texts:
                words = random(1, 8, 32, seed=text + 9, dtype=torch.float32)
                call = {"hidden_states": x[text], "encoder_hidden_states": words}
                call |= {"pooled_projections": words[:, 0], "timestep": torch.tensor([level])}
                call |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
                with transformer.cache_context(f"{text}" if named else None):
                    output = transformer(**call).sample
                found[text].append(output)
                x[text] = x[text] - output / STEPS
        return list(found.values())

    together = run(1, 2)
    for text, outputs in zip((1, 2), together, strict=True):
        (alone,) = run(text)
        assert all(torch.equal(a, b) for a, b in zip(alone, outputs, strict=True))


def test_guidance_in_two_calls_keeps_two_states() -> None:
    guided = {
        "true_cfg_scale": 2.0,
        "negative_prompt_embeds": random(1, 8, 32, seed=5, dtype=torch.float32),
        "negative_pooled_prompt_embeds": random(1, 32, seed=6, dtype=torch.float32),
    }
    model = Model("flux")
    uncached = model(**guided)
    first = model.cache(steps_mask=MASK).watched(**guided)
    assert [bool(calls) for calls in model.calls] == [bool(m) for m in MASK for _ in range(2)]
    assert not torch.equal(first, uncached) and torch.equal(model(**guided), first)
    memories = hook_on(model.transformer).engine.branches.values()
    one, other = (state.memories[0][-1].anchors[0] for state in memories)
    assert torch.equal(one.inputs.hidden_states, other.inputs.hidden_states)
    assert not torch.equal(one.residual.hidden_states, other.residual.hidden_states)

"""The parts of what a step cache costs, timed one by one with the library's own functions."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

from xfuser_fastcache import apply_cache_on_transformer, remove_cache
from xfuser_fastcache.backends import FORECASTERS, gate_of
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.consensus.collective import Consensus
from xfuser_fastcache.consensus.header import Header
from xfuser_fastcache.forecasters.base import Forecaster
from xfuser_fastcache.gates.base import Evidence
from xfuser_fastcache.measurements.moments import SLOTS, Moments, Reference, measure
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory

EVERY, COMPUTED, SKIPPED = "every step", "computed step", "skipped step"
# Seconds after which the timing of a part ends, steady or not.
LIMIT_S = 0.5
# Every rank must take the same number of rounds of consensus: so many, so many times.
ROUNDS, REPEATS = 50, 9
# Noise levels of a step, of its anchor and of the anchor before.
LEVELS = (0.4, 0.5, 0.6)
# Turns of two calls that are compared, and steps of a generation that does nothing.
TURNS, STEPS = 5, 28


@dataclass(frozen=True)
class Boundary:
    """What passes into and out of a span, or a whole forward pass; shapes as in `Streams`.

    Attributes:
        earlier: what entered it at a step before.
        inputs: what enters it.
        outputs: what leaves it.
    """

    earlier: Streams
    inputs: Streams
    outputs: Streams


@dataclass(frozen=True)
class Calls:
    """How often a step does what on this rank; a mean over the steps of a generation.

    Attributes:
        forwards: forward passes of the transformer.
        blocks: calls of blocks.
        measured: spans whose input is measured.
        spans: spans that are computed, or forecast.
        consensus: vectors posted and awaited.
        judged: spans that the gate weighs.
    """

    forwards: float = 1.0
    blocks: float = 1.0
    measured: float = 1.0
    spans: float = 1.0
    consensus: float = 1.0
    judged: float = 1.0


@dataclass(frozen=True)
class Part:
    """One part of what a cache costs.

    Attributes:
        name: what it is.
        when: the steps that pay it: `EVERY`, `COMPUTED` or `SKIPPED`.
        microseconds: median time of a call.
        calls: calls a step.
        forecaster: whose part it is; None where all backends pay it.
    """

    name: str
    when: str
    microseconds: float
    calls: float
    forecaster: str | None = None


@dataclass(frozen=True)
class Breakdown:
    """All parts against a step.

    Attributes:
        title: of the table.
        step_us: time of an uncached step, in microseconds.
        forecaster: whose parts count in the sums.
        parts: in order.
    """

    title: str
    step_us: float
    forecaster: str
    parts: list[Part]

    def total_us(self, when: str) -> float:
        """Time of all parts of a step that is `COMPUTED` or `SKIPPED`, in microseconds."""
        return sum(
            part.microseconds * part.calls
            for part in self.parts
            if part.when in (EVERY, when) and part.forecaster in (None, self.forecaster)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON; `share` is a ratio of `step_us`."""
        parts = [
            {**asdict(part), "share": part.microseconds * part.calls / self.step_us}
            for part in self.parts
        ]
        totals = {
            when: {"microseconds": us, "share": us / self.step_us}
            for when, us in ((when, self.total_us(when)) for when in (COMPUTED, SKIPPED))
        }
        return {**asdict(self), "parts": parts, "totals": totals}

    def print(self, caption: str) -> None:
        """Print all parts as a table, with `caption` below it."""

        def shown(share: float) -> str:
            return f"{share:.3%}" if share >= 1e-5 else "< 0.001%"

        table = Table(
            title=f"{self.title}, {torch.get_num_threads()} thread(s)",
            caption=caption,
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("part")
        table.add_column("paid by")
        for name in ("us a call", "calls a step", "share of a step"):
            table.add_column(name, justify="right")
        for part in self.parts:
            share = part.microseconds * part.calls / self.step_us
            row = (f"{part.microseconds:,.1f}", f"{part.calls:.4g}", shown(share))
            table.add_row(part.name, part.when, *row)
        table.add_section()
        for when in (COMPUTED, SKIPPED):
            total = self.total_us(when)
            share = total / self.step_us
            table.add_row(f"sum, {self.forecaster}", when, f"{total:,.1f}", "", shown(share))
        Console(width=100).print(table)


def median_us(call: Callable[[], Any], limit_s: float | None = None) -> float:
    """Return the median time of `call` in microseconds, on the threads that torch has now.

    Args:
        call: what is timed.
        limit_s: longest time to spend on it, in seconds; left out, `LIMIT_S`.
    """
    limit_s = limit_s or LIMIT_S
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    timed = timer.adaptive_autorange(0.05, min_run_time=limit_s / 5, max_run_time=limit_s)
    return timed.median * 1e6


def consensus_us(consensus: Consensus, spans: int, device: torch.device) -> float:
    """Return the median time of a round, in microseconds; every rank of the group calls it.

    It is what a rank waits whose peers are punctual. A pipeline posts as much and does not wait.
    """
    moments = torch.zeros((spans, SLOTS), dtype=torch.int64, device=device)
    timer = Timer(
        "consensus.wait(consensus.post(header, moments))",
        globals={"consensus": consensus, "header": Header(0, 0, 0, 0), "moments": moments},
        num_threads=torch.get_num_threads(),
    )
    return statistics.median(timer.timeit(ROUNDS).median for _ in range(REPEATS)) * 1e6


def added_us(dressed: Callable[[], Any], bare: Callable[[], Any]) -> float:
    """Return how much longer one call takes than another, in microseconds.

    They take turns, so that whatever disturbs the machine falls on both.
    """
    return statistics.median(
        median_us(dressed, LIMIT_S / TURNS) - median_us(bare, LIMIT_S / TURNS) for _ in range(TURNS)
    )


def idle_model(blocks: int) -> Any:
    """Return a FLUX transformer of so many blocks; it and they do nothing."""
    from diffusers import FluxTransformer2DModel

    def idle(**_: Any) -> None:
        pass

    def pass_by(hidden_states: torch.Tensor, text: torch.Tensor) -> Any:
        return text, hidden_states

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=0, num_single_layers=blocks, attention_head_dim=16, num_attention_heads=1,
            in_channels=4, joint_attention_dim=4, pooled_projection_dim=4, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
    model.forward = idle
    for block in model.single_transformer_blocks:
        block.forward = pass_by
    return model


@torch.no_grad()
def hooks_us(spans: int, device: torch.device) -> tuple[float, float]:
    """Return what the hooks add to a transformer and to a block that do nothing, in microseconds.

    The transformer's part is a step opened, decided and closed by a rank that agrees with itself:
    all but the wire, the gate and the arithmetic on tokens. The block is one within a span.

    Args:
        spans: that are decided.
        device: of the tokens.
    """
    bare, hooked = idle_model(3 * spans), idle_model(3 * spans)
    tokens = torch.zeros(1, 4, 16, device=device)
    # Falling, then from the top again: a generation after the other.
    times = itertools.cycle(torch.linspace(1.0, 1.0 / STEPS, STEPS, device=device).split(1))
    block_us = 0.0

    def in_a_span(**_: Any) -> None:
        nonlocal block_us
        first, block = hooked.single_transformer_blocks[:2]
        first(tokens, tokens)
        other = bare.single_transformer_blocks[1]
        block_us = added_us(lambda: block(tokens, tokens), lambda: other(tokens, tokens))

    def step(model: Any) -> None:
        model(hidden_states=tokens, timestep=next(times))

    alone = None
    if dist.is_initialized():
        alone = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    apply_cache_on_transformer(hooked, granularity=spans, process_group=alone)
    transformer_us = added_us(lambda: step(hooked), lambda: step(bare))
    remove_cache(hooked)
    hooked.forward = in_a_span
    apply_cache_on_transformer(hooked, granularity=spans, process_group=alone)
    step(hooked)
    return transformer_us, block_us


@torch.no_grad()
def time_parts(
    boundary: Boundary, config: CacheConfig, calls: Calls, round_us: float, spans: int
) -> list[Part]:
    """Time all parts but the consensus, with the library's own functions.

    Args:
        boundary: of what the config's forecaster stands in for: one span, or the forward pass.
        config: for the gate; of the forecasters, those that stand in for the same are timed.
        calls: of a step.
        round_us: time of a consensus, in microseconds.
        spans: that are decided.
    """
    hidden_states = boundary.inputs.hidden_states
    transformer_us, block_us = hooks_us(spans, hidden_states.device)

    reference = Reference.of(boundary.earlier.hidden_states)
    first = Moments.decode(measure(hidden_states, None, 0).tolist(), 0)
    exponent = first.next_exponent(0)
    moments = Moments.decode(measure(hidden_states, reference, exponent).tolist(), exponent)
    evidence = Evidence(
        change=moments.change,
        change_squared=moments.change_squared,
        reference=moments.reference,
        tokens=moments.tokens,
        dim=hidden_states.shape[-1],
        lag=1,
        noise_levels=LEVELS,
    )
    gate = gate_of(config)
    change_us = median_us(lambda: measure(hidden_states, reference, exponent))
    reference_us = median_us(lambda: Reference.of(hidden_states))
    gate_us = median_us(lambda: gate.judge(evidence))
    parts = [
        Part("hooks: transformer", EVERY, transformer_us, calls.forwards),
        Part("hooks: block", EVERY, block_us, calls.blocks),
        Part("moments: change", EVERY, change_us, calls.measured),
        Part("moments: reference", COMPUTED, reference_us, calls.spans),
        Part("consensus", EVERY, round_us, calls.consensus),
        Part("gate", EVERY, gate_us, calls.judged),
    ]
    whole_forward = config.methods.forecaster.whole_forward
    for name, make in FORECASTERS.items():
        if make.whole_forward != whole_forward:
            continue  # what it stands in for is not at hand
        remember_us, forecast_us = forecaster_us(boundary, make())
        parts += [
            Part(f"forecast: {name}, remember", COMPUTED, remember_us, calls.spans, name),
            Part(f"forecast: {name}", SKIPPED, forecast_us, calls.spans, name),
        ]
    return parts


def forecaster_us(boundary: Boundary, forecaster: Forecaster) -> tuple[float, float]:
    """Return the times to remember a computed span and to forecast one, in microseconds."""
    inputs, outputs = boundary.inputs, boundary.outputs
    reference = Reference.of(inputs.hidden_states)

    now, latest, before = LEVELS

    def anchor(noise_level: float, entered: Streams) -> Anchor:
        return Anchor(noise_level, entered, forecaster.kept(entered, outputs), reference)

    older = forecaster.update(Memory(), anchor(before, boundary.earlier))
    memory = forecaster.update(older, anchor(latest, inputs))
    return (
        median_us(lambda: forecaster.update(older, anchor(latest, inputs))),
        median_us(lambda: forecaster.forecast(memory, inputs, now)),
    )

"""The order of cells, by what they are worth; each is on disk before the next begins."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from xfuser_fastcache.benchmarks.gpu import costs, peers, toys, wire
from xfuser_fastcache.benchmarks.gpu.compiled import GRAPHS, compiled
from xfuser_fastcache.benchmarks.gpu.families import FAMILIES
from xfuser_fastcache.benchmarks.gpu.machine import describe
from xfuser_fastcache.benchmarks.gpu.record import BudgetSpent, Figures, Record
from xfuser_fastcache.benchmarks.gpu.speed import (
    MEASURES,
    SKIPPED,
    SKIPPED_LONG,
    UNCACHED,
    ZERO,
    Rounds,
    variants,
    warm_up,
)
from xfuser_fastcache.benchmarks.gpu.subject import Subject, computed_mask, same_bits

# Seconds between two alarms; far longer than it takes to write the report.
RING_AGAIN_S = 5.0


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        families: names, in order.
        steps: of a generation.
        rounds: of interleaved generations.
        small: whether this is a rehearsal with tiny shapes.
        toys: folder of the embedded toys.
        device: where models run.
    """

    families: list[str]
    steps: int
    rounds: int
    small: bool
    toys: Path
    device: torch.device

    @property
    def repeat(self) -> int:
        """Calls of a short measurement."""
        return 20 if self.small else 300


@contextmanager
def _ends_after(seconds: float) -> Iterator[None]:
    """Raise `BudgetSpent` in what is running when the time is up.

    It rings again while nobody has heard: an exception that reaches Python in the midst of a
    finalizer is printed and forgotten. Only a main thread can be interrupted, and only where
    nobody else has set the alarm.
    """

    def ring(number: int, frame: Any) -> None:
        raise BudgetSpent

    free = threading.current_thread() is threading.main_thread()
    if not free or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), RING_AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(plan: Plan, output: Path, budget_s: float, command: str) -> dict[str, Any]:
    """Measure everything that the time allows.

    Args:
        plan: what to measure.
        output: JSON file; it holds at any time what was measured so far.
        budget_s: seconds for all.
        command: as it was given, for the report.

    Returns:
        The report, as in the file.
    """
    device, machine = describe(plan.device)
    head = {
        "command": command,
        "small": plan.small,
        "steps": plan.steps,
        "device": device,
        "machine": machine,
        "families": {name: FAMILIES[name].title for name in plan.families},
    }
    record = Record(output, head, budget_s)
    try:
        with _ends_after(budget_s):
            for name in plan.families:
                _with_subject(record, plan, name, "build", _family)
            _wire_and_toys(record, plan)
            for name in plan.families:
                if not FAMILIES[name].long:
                    _with_subject(record, plan, name, "build to compile", _compiled)
    except BudgetSpent:
        print("the budget is spent; what was measured is kept", flush=True)
    finished = record.left_s > 0
    record.write(finished)
    return record.as_dict(finished)


def _with_subject(
    record: Record,
    plan: Plan,
    name: str,
    cell: str,
    measure: Callable[[Record, Plan, Subject], None],
) -> None:
    """Build a model, measure it, and free its memory."""
    held: list[Subject] = []

    def build() -> Figures:
        subject = Subject(name, FAMILIES[name], plan.device, plan.small, plan.steps)
        subject.synchronize()
        held.append(subject)
        return {"parameters": subject.parameters, "steps": subject.steps}

    try:
        if record.measure(name, cell, "model", build, 0.0 if plan.small else 15.0):
            measure(record, plan, held[0])
    finally:
        held.clear()
        free()


def free() -> None:
    """Give back what no tensor holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _family(record: Record, plan: Plan, subject: Subject) -> None:
    name = subject.name

    def warm() -> Figures:
        warm_up(subject)
        return {}

    if not record.measure(name, "warm-up", "all", warm):
        return
    long = subject.family.long
    shares = SKIPPED_LONG if long else SKIPPED
    rounds = Rounds(record, "speed", subject, variants(subject.steps, shares))
    # The first round alone is worth more than all that follows; the others make it a median.
    rounds.run(1 if long else plan.rounds)
    generation_s = 0.0 if plan.small else rounds.uncached_ms * subject.steps / 1000
    if rounds.times[UNCACHED]:
        plain = rounds.pictures[UNCACHED]

        def identity() -> Figures:
            with subject.cached(cache_ratio_threshold=0):
                ms, latents = subject.timed()
            return {"identical_to_uncached": same_bits(plain, latents), "ms_a_step": ms}

        record.measure(name, "identity", ZERO, identity, generation_s)
        record.measure(name, "digest", "two generations", partial(_digest, subject), generation_s)
    held = costs.MEMORY_FORECASTERS_LONG if long else costs.MEMORY_FORECASTERS
    for forecaster in (None, *held):
        record.measure(
            name,
            "memory",
            forecaster or UNCACHED,
            partial(costs.memory, subject, forecaster),
            generation_s,
        )
    free()
    options: dict[str, dict[str, Any] | None] = {
        UNCACHED: None,
        MEASURES: variants(subject.steps, ())[MEASURES],
        "mask, damped_taylor": {"forecaster": "damped_taylor", "steps_mask": [1, 0, 1]},
        "mask, output": {"forecaster": "output", "steps_mask": [1, 0, 1]},
        "mask, data": {"forecaster": "data", "steps_mask": [1, 0, 1]},
    }
    for variant, given in options.items():
        record.measure(
            name,
            "synchronisations",
            variant,
            partial(costs.synchronisations, subject, given),
        )
    record.measure(
        name, "moments", "alone", lambda: costs.moments(subject, rounds.uncached_ms, plan.repeat)
    )
    record.measure(name, "kernels", "torch.profiler", partial(costs.kernels, subject))
    rounds.pictures.clear()
    _peers(record, plan, subject, generation_s)


def _digest(subject: Subject) -> Figures:
    """Compare the decisions of a gate that measures and skips, in two generations of their own."""
    from xfuser_fastcache.apply import get_cache_statistics

    seen = []
    for _ in range(2):
        with subject.cached(cache_ratio_threshold=0.5, forecaster="output"):
            latents = subject.denoise()
            statistics = get_cache_statistics(subject.model)
        seen.append((statistics["decisions_digest"], latents))
    return {
        "digest_repeats": seen[0][0] == seen[1][0],
        "repeats_to_the_bit": same_bits(seen[0][1], seen[1][1]),
        "share_skipped": statistics["block_approx_ratio"],
    }


def _peers(record: Record, plan: Plan, subject: Subject, generation_s: float) -> None:
    long = subject.family.long
    changes: list[torch.Tensor] = []

    def note() -> Figures:
        changes.append(peers.residual_changes(subject))
        computed = sum(computed_mask(subject.steps, peers.SKIPPED))
        return {"threshold": peers.threshold_for(changes[0], computed)}

    if long:
        # Their peers go by a mask.
        changes.append(torch.zeros(0))
    elif not record.measure(subject.name, "peers", "first block's changes", note, 2 * generation_s):
        return
    repeat = 1 if plan.small or long else 2
    for peer in peers.PEERS_LONG if long else peers.PEERS:
        record.measure(
            subject.name,
            "peers",
            peer,
            partial(peers.peer, subject, peer, changes[0], repeat),
            1.5 * repeat * generation_s,
        )


def _wire_and_toys(record: Record, plan: Plan) -> None:
    needs_s = 0.0 if plan.small else 10.0
    toys_of = [name for name in plan.families if FAMILIES[name].toy is not None]
    for name in toys_of[:1] if plan.small else toys_of:
        found: list[list[int]] = []

        def draw(name: str, dtype: str, found: list[list[int]]) -> Figures:
            pictures = 1 if plan.small else 4
            mask = found[0] if found else None
            figures = toys.toy(name, plan.toys, plan.device, dtype, pictures, mask)
            found.append(figures["mask"])
            return figures

        # Half precision takes minutes on a CPU.
        for dtype in ("float32",) if plan.small else toys.DTYPES:
            measure = partial(draw, name, dtype, found)
            record.measure(name, "toy", dtype, measure, needs_s)
            free()
    for backend in ("nccl", "gloo"):
        record.measure(
            "any",
            "consensus",
            backend,
            partial(wire.consensus_cost, backend, 50 if plan.small else 1000),
            0.0 if plan.small else 15.0,
        )


def _compiled(record: Record, plan: Plan, subject: Subject) -> None:
    try:
        compiled(record, subject, "eager" if plan.small else "inductor", min(plan.rounds, 2))
        if subject.device.type == "cuda":
            compiled(record, subject, GRAPHS, min(plan.rounds, 2))
    finally:
        torch.compiler.reset()


def default_device() -> torch.device:
    """Return the GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

"""The same ratios where the blocks are compiled: what the cache adds to the compiler's work."""

from __future__ import annotations

import time

import torch

from xfuser_fastcache.benchmarks.gpu.record import Figures, Record
from xfuser_fastcache.benchmarks.gpu.speed import FORECASTERS, Rounds, variants
from xfuser_fastcache.benchmarks.gpu.subject import Subject

SKIPPED = (0.64,)


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _compile_blocks(subject: Subject, backend: str) -> str:
    model = subject.model
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(backend=backend)
        return "transformer.compile_repeated_blocks()"
    # SD3's and PixArt's models do not name their blocks.
    for block in model.transformer_blocks:
        block.compile(backend=backend)
    return "block.compile() for each block"


def compiled(record: Record, subject: Subject, backend: str, rounds: int) -> None:
    """Compile the blocks, then time rounds uncached and cached, and count graphs.

    Args:
        record: takes the cells "compile" and "compiled speed".
        subject: stays compiled; throw it away.
        backend: of torch.compile.
        rounds: as `Rounds.run` takes them.
    """
    rounds_of = Rounds(record, "compiled speed", subject, variants(subject.steps, SKIPPED))

    def compile_it() -> Figures:
        torch.compiler.reset()
        before = _graphs()
        started = time.perf_counter()
        how = _compile_blocks(subject, backend)
        subject.denoise(3)
        subject.synchronize()
        return {
            "how": how,
            "backend": backend,
            "seconds": time.perf_counter() - started,
            "graphs": _graphs() - before,
        }

    def graphs_added() -> Figures:
        before = _graphs()
        for forecaster in FORECASTERS:
            with subject.cached(forecaster=forecaster, steps_mask=[1, 1, 0, 1]):
                subject.denoise(4)
        subject.synchronize()
        return {"graphs_added": _graphs() - before}

    name = subject.name
    # With less left, the compiler would be cut off before anything is timed.
    needs_s = 45.0 if backend == "inductor" else 0.0
    if not record.measure(name, "compile", "uncached", compile_it, needs_s):
        return
    if not record.measure(name, "compile", "cached", graphs_added):
        return
    before = _graphs()
    rounds_of.run(rounds)
    record.measure(
        name, "compile", "during the timed rounds", lambda: {"graphs_added": _graphs() - before}
    )

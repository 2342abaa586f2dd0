"""The same ratios where the blocks are compiled: what the cache adds to the compiler's work."""

from __future__ import annotations

import time

import torch

from xfuser_fastcache.benchmarks.gpu.record import Figures, Record
from xfuser_fastcache.benchmarks.gpu.speed import FORECASTERS, Rounds, variants
from xfuser_fastcache.benchmarks.gpu.subject import Subject

SKIPPED = (0.64,)
# torch's own CUDA graphs, one for each compiled block.
GRAPHS = "reduce-overhead"


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _compile_blocks(subject: Subject, how: str) -> str:
    model = subject.model
    given = {"mode": how} if how == GRAPHS else {"backend": how}
    shown = f'mode="{how}"' if how == GRAPHS else ""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(**given)
        return f"transformer.compile_repeated_blocks({shown})"
    # SD3's and PixArt's models do not name their blocks.
    for block in model.transformer_blocks:
        block.compile(**given)
    return f"block.compile({shown}) for each block"


def compiled(record: Record, subject: Subject, how: str, rounds: int) -> None:
    """Compile the blocks, then time rounds uncached and cached, and count graphs.

    Args:
        record: takes the cells "compile" and "compiled speed", or those with "CUDA graphs".
        subject: stays compiled; throw it away.
        how: backend of torch.compile, or `GRAPHS`.
        rounds: as `Rounds.run` takes them.
    """
    name = subject.name
    of_graphs = " with CUDA graphs" if how == GRAPHS else ""
    compile_cell, speed_cell = f"compile{of_graphs}", f"compiled speed{of_graphs}"
    rounds_of = Rounds(record, speed_cell, subject, variants(subject.steps, SKIPPED))

    def compile_it() -> Figures:
        torch.compiler.reset()
        before = _graphs()
        started = time.perf_counter()
        called = _compile_blocks(subject, how)
        subject.denoise(3)
        subject.synchronize()
        return {
            "how": called,
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

    # With less left, the compiler would be cut off before anything is timed.
    needs_s = 0.0 if how == "eager" else 45.0
    if not record.measure(name, compile_cell, "uncached", compile_it, needs_s):
        return
    if not record.measure(name, compile_cell, "cached", graphs_added):
        return
    before = _graphs()
    rounds_of.run(rounds)
    record.measure(
        name, compile_cell, "during the timed rounds", lambda: {"graphs_added": _graphs() - before}
    )

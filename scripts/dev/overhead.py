"""Measure what the cache costs: the never-skip ratio, and where it goes.

    python scripts/overhead.py --config configs/toy_flux_fast.yaml --pairs 30
    python scripts/overhead.py --flux_block --dtype bfloat16

The first runs pairs of generations, uncached and with a gate that measures, agrees and decides at
every step and never skips, in alternating order, and prints the median of the pairwise ratios of
the denoising loop with a 95 % bootstrap interval. Then it times the cache's parts one by one at
this model's size and gives each as a share of an uncached step. Takes the flags of generate.py.

The second times the parts for one block in the shape of FLUX.1 with random weights, which needs no
model; a share is then of one block computed. Started by torchrun, both agree over the wire.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track

from scripts.dev._parts import (
    Boundary,
    Breakdown,
    Calls,
    Part,
    consensus_us,
    median_us,
    time_parts,
)
from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache
from xfuser_fastcache.benchmarks.worker import PACKAGES
from xfuser_fastcache.cli.flags import flags_of
from xfuser_fastcache.cli.generate import cache_config, options_from
from xfuser_fastcache.config.budget import BUDGETS
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.consensus.collective import BlockList, Consensus
from xfuser_fastcache.consensus.topology import PlainLayout
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.reports.measured import environment
from xfuser_fastcache.xdit.generator import Generator
from xfuser_fastcache.xdit.loaded import DTYPES, finish, load_in_layout, start

# Small enough to reject every change, large enough not to be the "never" that needs no test.
NEVER = 1e-9
# Without an option a budget would decide.
GATE = CacheConfig(test="chi2")
# Seconds after which no further pass of a block is begun: it takes long on a CPU.
BLOCK_LIMIT_S = 60.0
# The double and single blocks of FLUX.1.
FLUX_BLOCKS = 57


@dataclass(frozen=True)
class BlockShape:
    """Size of a double-stream FLUX block; the defaults are FLUX.1's at 1024 x 1024 pixels.

    Attributes:
        width: channels of a token.
        heads: of attention, `width / 128`, which the rotary embedding needs.
        side: image tokens along each edge of the picture.
        text_tokens: tokens of text.
    """

    width: int = 3072
    heads: int = 24
    side: int = 64
    text_tokens: int = 512


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read this script's own flags; return them, and the arguments that are left over.

    Raises:
        SystemExit: a wrong flag; with --flux_block also one of generate.py.
    """
    flags = flags_of(
        "scripts/overhead.py",
        __doc__,
        epilog="Without --flux_block: also every flag of fastcache generate, see its --help.",
        allow_abbrev=False,
    )
    what = flags.add_mutually_exclusive_group()
    what.add_argument("--pairs", type=int, default=30, help="of generations; default 30")
    what.add_argument("--flux_block", action="store_true", help="time one block of FLUX.1's shape")
    flags.add_argument("--dtype", choices=DTYPES, help="default bfloat16, float32 without a GPU")
    flags.add_argument("--report", type=Path, help="write all figures as JSON")
    given, others = flags.parse_known_args(arguments)
    if given.pairs < 1:
        flags.error(f"--pairs {given.pairs}: give at least 1")
    if given.flux_block and others:
        flags.error(f"--flux_block takes --dtype and --report, not {' '.join(others)}")
    return given, others


# ---- at the model's size ------------------------------------------------------------------------


def run_pairs(generator: Generator, config: CacheConfig, pairs: int) -> np.ndarray:
    """Return seconds of the slowest rank's denoising loop, `(pairs, 2)`: uncached, cached.

    Raises:
        RuntimeError: a block was skipped.
    """
    seconds = np.zeros((pairs, 2))
    first_rank = dist.get_rank() == 0
    for pair in track(range(pairs), "pairs", disable=not first_rank):
        for cached in (False, True) if pair % 2 else (True, False):
            run = generator.run("", config if cached else None)
            if cached and run.statistics["block_approx_ratio"]:
                raise RuntimeError("the gate let a block be skipped; this measures nothing")
            ranks = generator.gather(run)
            if first_rank:
                seconds[pair, int(cached)] = max(r.seconds for r in ranks if r is not None)
    return seconds


def model_parts(generator: Generator, config: CacheConfig) -> list[Part]:
    """Time the parts on what passes through one generation's blocks; every rank calls it.

    Through the transformer, where the forecaster stands in for its whole forward pass.
    """
    pipe = generator.pipe
    apply_cache_on_transformer(pipe.transformer, config=config, scheduler=pipe.scheduler)
    hook = hook_on(pipe.transformer)
    engine, blocks = hook.engine, hook.attachment.blocks
    whole = engine.forecaster.whole_forward
    first, last = (pipe.transformer,) * 2 if whole else (blocks[0], blocks[-1])
    entered: deque[Streams] = deque(maxlen=2)
    left: deque[Streams] = deque(maxlen=1)
    forwards = itertools.count()

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered.append(engine.plan.contracts[0].read(args, kwargs))
        next(forwards)

    def leave(module: Any, args: tuple[Any, ...], output: Any) -> None:
        left.append(engine.plan.contracts[-1].unpack(output))

    handles = (
        first.register_forward_hook(enter, with_kwargs=True),
        last.register_forward_hook(leave),
    )
    generator.run("")
    for handle in handles:
        handle.remove()
    done = get_cache_statistics(pipe.transformer)
    spans = engine.decisions.spans
    passes = next(forwards) / done["steps"]
    held = {piece.span for piece in engine.plan.pieces()}
    calls = Calls(
        forwards=passes,
        blocks=0 if whole else passes * len(blocks),
        measured=passes * len({piece.span for piece in engine.plan.pieces() if piece.begins}),
        spans=passes * len(held),
        consensus=done["collectives_per_step"],
        judged=done["collectives_per_step"] * spans,
    )
    boundary = Boundary(entered[0], entered[-1], left[0])
    round_us = consensus_us(engine.consensus, spans, boundary.inputs.hidden_states.device)
    remove_cache(pipe.transformer)
    return time_parts(boundary, config, calls, round_us, spans)


def measure_model(pairs: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run the pairs and time the parts; print them and return the report on rank 0."""
    # A calibration or a mask would skip without asking the gate.
    config = replace(
        (cache_config(options) or GATE).resolved(),
        cache_ratio_threshold=NEVER,
        calibration=None,
        **dict.fromkeys(BUDGETS),
        steps_mask=None,
    )
    generator = Generator(load_in_layout(options, options.dtype), options)
    generator.run("warm-up")
    generator.run("warm-up", config)
    seconds = run_pairs(generator, config, pairs)
    parts = model_parts(generator, config)
    if dist.get_rank() != 0:
        return {}
    ratios = seconds[:, 1] / seconds[:, 0]
    draws = np.random.default_rng(0).choice(ratios, (10_000, pairs))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    per_step = np.median(seconds, axis=0) / options.num_inference_steps * 1e3
    print(
        f"never-skip ratio {np.median(ratios):.4f} (95 % interval {low:.4f} to {high:.4f}, "
        f"{pairs} pairs); a step takes {per_step[0]:.2f} ms uncached, {per_step[1]:.2f} ms "
        f"cached; {dist.get_world_size()} rank(s), granularity {config.granularity!r}, "
        f"{len(options.prompt)} picture(s)"
    )
    title = f"{options.model}, an uncached step: {per_step[0]:.2f} ms"
    breakdown = Breakdown(title, per_step[0] * 1e3, config.forecaster, parts)
    shown_us = (np.median(ratios) - 1) * breakdown.step_us
    breakdown.print(
        "Each part is timed alone, over and over, in warm caches; the pairs show "
        f"{shown_us:.0f} us a step in all."
    )
    return {
        "model": options.model,
        "ratios": ratios.tolist(),
        "interval": [low, high],
        "step_ms": {"uncached": per_step[0], "cached": per_step[1]},
        "breakdown": breakdown.as_dict(),
    }


# ---- one block of FLUX.1 ------------------------------------------------------------------------


@torch.no_grad()
def measure_block(
    dtype: torch.dtype, shape: BlockShape | None = None, limit_s: float = BLOCK_LIMIT_S
) -> Breakdown:
    """Time a double-stream block with random weights, and the parts of a span of it alone.

    Args:
        dtype: of weights and tokens.
        shape: of the block; None is FLUX.1's.
        limit_s: after which no further pass of the block is begun, in seconds.
    """
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxTransformerBlock

    from diffusers_adapters.flux import FluxAdapter

    shape = shape or BlockShape()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    image_tokens = shape.side**2
    head = shape.width // shape.heads
    with device:
        block = FluxTransformerBlock(shape.width, shape.heads, head).to(dtype).eval()
        image = torch.randn(1, image_tokens, shape.width).to(dtype)
        text = torch.randn(1, shape.text_tokens, shape.width).to(dtype)
        temb = torch.randn(1, shape.width).to(dtype)
        edge = torch.arange(shape.side, dtype=torch.float32)
        places = torch.cartesian_prod(torch.zeros(1), edge, edge)
        ids = torch.cat((torch.zeros(shape.text_tokens, 3), places))
    rotary = FluxPosEmbed(10_000, [16, 56, 56])(ids)
    inputs = Streams(image, text)

    def compute() -> Any:
        return block(image, text, temb, rotary)

    contract = FluxAdapter.block_lists["transformer_blocks"].of(block)
    outputs = contract.unpack(compute())
    step_us = median_us(compute, limit_s)
    config = GATE.resolved()
    consensus = Consensus(
        PlainLayout().decision_group(),
        backend=config.sync_backend,
        timeout_s=config.sync_timeout_s,
        config_digest=config.digest(),
        block_lists=(BlockList(1, 1),),
    )
    round_us = consensus_us(consensus, 1, device)
    consensus.close()
    earlier = inputs.map(lambda x: x + 0.01 * torch.randn_like(x))
    parts = time_parts(Boundary(earlier, inputs, outputs), config, Calls(), round_us, 1)
    title = (
        f"one block, {shape.width} wide, {shape.heads} heads, {image_tokens} + {shape.text_tokens} "
        f"tokens, {str(dtype).removeprefix('torch.')}: {step_us / 1e3:.2f} ms"
    )
    return Breakdown(title, step_us, config.forecaster, parts)


def measure_flux(dtype: str | None) -> dict[str, Any]:
    """Time one block of FLUX.1 in a named dtype; print it and return the report on rank 0."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo")
    dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    first_rank = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(stderr=True, quiet=not first_rank)
    with console.status("timing one block, then the parts"):
        breakdown = measure_block(DTYPES[dtype])
    if not first_rank:
        return {}
    breakdown.print(
        f"The step is one block computed. With the {FLUX_BLOCKS} blocks of FLUX.1 in one span, all "
        f"but the block's hook is called once for all of them: {FLUX_BLOCKS} times less."
    )
    return {"shape": asdict(BlockShape()), "dtype": dtype, "breakdown": breakdown.as_dict()}


def main(arguments: list[str]) -> int:
    """Measure what the command line asks for; return the exit status."""
    given, others = parse(arguments)
    path = given.report
    if given.flux_block:
        report = measure_flux(given.dtype)
    else:
        start()
        options = options_from(others)
        options.dtype = given.dtype or options.dtype
        path = path or options.report
        report = measure_model(given.pairs, options)
    if report and path:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        report["environment"] = environment(*PACKAGES) | {"ranks": ranks}
        Path(path).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    if dist.is_initialized():
        finish()
    return 0

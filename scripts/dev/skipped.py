#!/usr/bin/env python3
"""Show what a skipped step costs, part by part, on ranks that share the tokens.

    python scripts/dev/skipped.py --ranks 1 2 4

A FLUX transformer of 57 narrow blocks: nothing but the host's work is left of a step, which no rank
takes off another. Each rank is given its share of the tokens, as xDiT's pipelines do it, and all
agree at every step. Of each part it prints the least time of all skipped steps, since what else
runs on a machine only adds, how often it is called, and how many operators of torch it runs.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.dev._ranks import run_ranks
from xfuser_fastcache import apply_cache_on_transformer
from xfuser_fastcache.cli.flags import flags_of
from xfuser_fastcache.hooks import hook_on

STEPS = 10


class Watch(TorchDispatchMode):
    """Tells the parts of forward passes apart; what runs within a part is not part of it.

    Attributes:
        steps: (skipped, part -> seconds, part -> calls, part -> operators) of each forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[bool, dict[str, float], Counter[str], Counter[str]]] = []
        self._stack: list[str] = []
        self._since = 0.0
        self._begin()

    def _begin(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._calls: Counter[str] = Counter()
        self._operators: Counter[str] = Counter()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self._spent[self._stack[-1]] += now - self._since
        self._since = now

    def around(self, holder: Any, name: str, part: str) -> None:
        """Count a function of an object to a part, from now on."""
        function = getattr(holder, name)

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(part)
            self._calls[part] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        setattr(holder, name, watched)

    def close(self, skipped: bool) -> None:
        """End a forward pass."""
        self.steps.append((skipped, self._spent, self._calls, self._operators))
        self._begin()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator."""
        if self._stack:
            self._operators[self._stack[-1]] += 1
        return op(*args, **(kwargs or {}))


def watch(transformer: nn.Module) -> Watch:
    """Tell the parts of a cached transformer's forward passes apart, from now on."""
    hook = hook_on(transformer)
    assert hook is not None
    engine, model, blocks = hook.engine, hook.attachment.model, hook.attachment.blocks
    seen = Watch()
    lists = {module for module in model.children() if isinstance(module, nn.ModuleList)}
    for name, module in model.named_children():
        if module not in lists:
            part = "norm and projection" if name in ("norm_out", "proj_out") else "embeddings"
            seen.around(module, "forward", part)
    for block in blocks:
        seen.around(block, "forward", "blocks")
    seen.around(engine.prober, "span_input", "moments")
    seen.around(engine.agreement, "decide_now", "agreeing")
    for name in ("open", "close"):
        seen.around(engine, name, "opening and closing")
    for name in ("forecast", "update"):
        seen.around(engine.passage, "_forecast" if name == "forecast" else "_leave", name)
    seen.around(transformer, "forward", "the rest")
    forward = transformer.forward

    def closed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.close(all(engine.passage.step_plan.skip))
        return output

    vars(transformer)["forward"] = closed
    return seen


def table_of(seen: Watch) -> list[dict[str, Any]]:
    """Return a row a part: its least time in a skipped step, calls and operators of one."""
    skipped = [step for step in seen.steps if step[0]]
    _, last, calls, operators = skipped[-1]
    return [
        {
            "part": part,
            "us": min(spent[part] for _, spent, _, _ in skipped) * 1e6,
            "calls": calls[part],
            "operators": operators[part],
        }
        for part in last
    ]


def narrow_flux() -> tuple[Any, dict[str, Any]]:
    """Return a FLUX transformer of 57 narrow blocks, and what it is given beside latents."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=19, num_single_layers=38, attention_head_dim=16, num_attention_heads=4,
        in_channels=16, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    given = {
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "pooled_projections": torch.randn(1, 32),
        "txt_ids": torch.zeros(16, 3),
    }
    return model, given


@torch.no_grad()
def rank_of(tokens: int, generations: int) -> list[dict[str, Any]]:
    """Be one rank: run generations on this rank's share of the tokens, and return what was seen."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, given = narrow_flux()
    scheduler = FlowMatchEulerDiscreteScheduler()
    share = tokens // dist.get_world_size()
    first = dist.get_rank() * share
    latents = torch.randn(1, tokens, 16)[:, first : first + share]

    def generate() -> None:
        scheduler.set_timesteps(STEPS)
        now = latents.clone()
        for time_step in scheduler.timesteps:
            output = model(
                hidden_states=now,
                timestep=time_step.expand(1) / 1000,
                img_ids=torch.zeros(share, 3),
                return_dict=False,
                **given,
            )
            now = scheduler.step(output[0], time_step, now, return_dict=False)[0]

    # A threshold that all changes pass: all but warm-up and the last step are skipped.
    options = {"cache_ratio_threshold": 1e6, "max_consecutive_skips": None}
    apply_cache_on_transformer(model, scheduler=scheduler, num_steps=STEPS, **options)
    generate()  # uncounted: allocations, and connections
    seen = watch(model)
    for _ in range(generations):
        generate()
    timed = table_of(seen)
    seen.steps.clear()
    with seen:
        generate()
    counted = {row["part"]: row for row in table_of(seen)}
    for row in timed:
        row["operators"] = counted[row["part"]]["operators"]
    return timed


def show(found: dict[int, list[dict[str, Any]]]) -> None:
    """Print the parts of a skipped step, a column a world."""
    table = Table(title="A skipped step on rank 0, us (calls, operators)", title_justify="left")
    table.add_column("part")
    for ranks in found:
        table.add_column(f"{ranks} ranks", justify="right")
    for part in [row["part"] for row in next(iter(found.values()))]:
        rows = [next(r for r in parts if r["part"] == part) for parts in found.values()]
        cells = [f"{r['us']:,.0f} ({r['calls']}, {r['operators']})" for r in rows]
        table.add_row(part, *cells)
    table.add_row("sum", *(f"{sum(r['us'] for r in parts):,.0f}" for parts in found.values()))
    Console(width=100).print(table)


def main(arguments: list[str]) -> int:
    """Measure what the command line asks for; return the exit status."""
    flags = flags_of("scripts/dev/skipped.py", __doc__)
    flags.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="of each world")
    flags.add_argument(
        "--tokens", type=int, default=256, help="of the image, on all ranks together"
    )
    flags.add_argument("--generations", type=int, default=5, help="that are timed")
    given = flags.parse_args(arguments)
    if min(given.ranks) < 1 or given.generations < 1 or given.tokens < max(given.ranks):
        flags.error("give at least 1 of --ranks and --generations, and a token a rank")
    asked = given.tokens, given.generations
    show({ranks: run_ranks(ranks, rank_of, *asked)[0] for ranks in given.ranks})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Measure what a token plan saves in time where most tokens stand still.

    python scripts/token_gain.py --sides 8 16 32 64 --moving 0.1 --report runs/token_gain.json

Runs a FLUX-shaped transformer with random weights over latents of which a share of the tokens
changes at every step, as much as if it were drawn anew, and the rest not at all: a picture that is
edited in one place. The gate of the block cache then computes every step, since its change is that
of the whole picture; a token plan computes what moves. Each plan's loop and the block cache's own
take turns; what is printed is the median of the pairwise ratios of wall time, and the smallest
number of tokens from which on a plan is faster.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache
from xfuser_fastcache.benchmarks.worker import PACKAGES
from xfuser_fastcache.cli.flags import flags_of
from xfuser_fastcache.reports.measured import environment, now

TEXT_TOKENS = 32
CHANNELS = 64
# Passes of a loop: two with all tokens to begin with, and the last one.
STEPS = 10
# Rejects every change that counts here.
GATE = {"cache_ratio_threshold": 0.01, "num_steps": STEPS}
PLANS: dict[str, dict[str, Any]] = {
    "split, reuse": {"motion_threshold": 0.01, "static_kv": "reuse"},
    "split, drop": {"motion_threshold": 0.01, "static_kv": "drop"},
    "merge": {"enable_token_merge": True},
    "split, reuse, merge": {
        "motion_threshold": 0.01, "static_kv": "reuse", "enable_token_merge": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """What one plan saves at one size.

    Attributes:
        plan: its name.
        tokens: image tokens.
        step_ms: time of a step of the block cache alone, in milliseconds.
        ratios: block cache alone over plan, wall time of a loop, one a turn.
        left_out: share of tokens that the blocks did not run on, 0 to 1.
    """

    plan: str
    tokens: int
    step_ms: float
    ratios: list[float]
    left_out: float

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return float(np.median(self.ratios))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    flags = flags_of("scripts/token_gain.py", __doc__)
    flags.add_argument(
        "--sides", type=int, nargs="+", default=[8, 16, 32], help="tokens along an edge"
    )
    flags.add_argument("--moving", type=float, default=0.1, help="share of tokens; default 0.1")
    flags.add_argument("--width", type=int, default=512, help="channels of a token; default 512")
    flags.add_argument("--layers", type=int, default=2, help="double blocks, and half the single")
    flags.add_argument("--plans", nargs="+", choices=list(PLANS), help="default: each")
    flags.add_argument("--turns", type=int, default=5, help="pairs of loops; default 5")
    flags.add_argument("--report", type=Path, help="write all figures as JSON")
    given = flags.parse_args(arguments)
    if not 0 <= given.moving <= 1:
        flags.error(f"--moving {given.moving}: give a share, 0 to 1")
    if given.width % 64:
        flags.error(f"--width {given.width}: give a multiple of 64")
    return given


def build(width: int, layers: int) -> Any:
    """Return a FLUX transformer with random weights and heads of 64 channels."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=layers,
        num_single_layers=2 * layers,
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 28, 28),
    ).eval()
    return model.to("cuda", torch.bfloat16) if on_gpu else model


class Loop:
    """The passes of one generation, over latents that change in one place.

    Args:
        model: a FLUX transformer.
        side: image tokens along an edge.
        moving: share of the tokens that change, the first rows of the picture.
    """

    def __init__(self, model: Any, side: int, moving: float):
        self.model = model
        like = next(model.parameters())
        noise = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=noise).to(like)

        edge = torch.arange(side, dtype=torch.float32)
        places = torch.cartesian_prod(torch.zeros(1), edge, edge).to(like.device)
        self.arguments = {
            "encoder_hidden_states": draw(1, TEXT_TOKENS, 64),
            "pooled_projections": draw(1, 64),
            "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=like.device),
            "img_ids": places,
            "return_dict": False,
        }
        first = draw(1, side * side, CHANNELS)
        self.latents = []
        for _ in range(STEPS):
            latents = first.clone()
            count = round(moving * side * side)
            latents[:, :count] = draw(1, count, CHANNELS)
            self.latents.append(latents)
        self.levels = torch.linspace(1.0, 0.5, STEPS).to(like)

    def __call__(self) -> float:
        """Run all passes; returns seconds."""
        started = now()
        for latents, level in zip(self.latents, self.levels, strict=True):
            self.model(hidden_states=latents, timestep=level[None], **self.arguments)
        return now() - started


@torch.no_grad()
def measure(
    model: Any, side: int, moving: float, turns: int, plans: Iterable[str] = PLANS
) -> list[Gain]:
    """Return what each of some plans saves at one size."""
    loop = Loop(model, side, moving)

    def cached(**options: Any) -> tuple[float, dict[str, Any]]:
        apply_cache_on_transformer(model, **GATE, **options)
        try:
            return loop(), get_cache_statistics(model)
        finally:
            remove_cache(model)

    loop()
    found = []
    for name in plans:
        options = PLANS[name]
        cached(**options)
        alone, planned = [], []
        for turn in range(turns):
            for own in (False, True) if turn % 2 else (True, False):
                seconds, statistics = cached(**(options if own else {}))
                (planned if own else alone).append(seconds)
                if statistics["block_approx_ratio"]:
                    raise RuntimeError("the gate let a block be skipped; this measures nothing")
                if own:
                    left_out = statistics["spatial_approx_ratio"]
        step_ms = float(np.median(alone)) / STEPS * 1e3
        ratios = [a / p for a, p in zip(alone, planned, strict=True)]
        found.append(Gain(name, side * side, step_ms, ratios, left_out))
    return found


def pays_from(gains: list[Gain]) -> int | None:
    """Return the smallest number of tokens from which on a plan is faster; None where it is not.

    Args:
        gains: of one plan, at several sizes.
    """
    least = None
    for gain in sorted(gains, key=lambda gain: -gain.tokens):
        if gain.ratio <= 1:
            break
        least = gain.tokens
    return least


def main(arguments: list[str]) -> int:
    """Measure what the command line asks for; return the exit status."""
    options = parse(arguments)
    model = build(options.width, options.layers)
    chosen = options.plans or list(PLANS)
    gains = []
    for side in options.sides:
        with Console(stderr=True).status(f"{side * side} tokens"):
            gains += measure(model, side, options.moving, options.turns, chosen)
    title = (
        f"{options.layers} + {2 * options.layers} blocks, {options.width} wide, "
        f"{options.moving:.0%} of the tokens move; loops of {STEPS} steps"
    )
    table = Table(title=title)
    columns = ("plan", "tokens", "block cache alone, a step", "faster", "range", "tokens left out")
    for name in columns:
        table.add_column(name, justify="left" if name == "plan" else "right")
    for gain in sorted(gains, key=lambda gain: (list(PLANS).index(gain.plan), gain.tokens)):
        table.add_row(
            gain.plan,
            str(gain.tokens),
            f"{gain.step_ms:.1f} ms",
            f"{gain.ratio:.2f}x",
            f"{min(gain.ratios):.2f} to {max(gain.ratios):.2f}",
            f"{gain.left_out:.1%}",
        )
    console = Console(width=110)
    console.print(table)
    least = {name: pays_from([g for g in gains if g.plan == name]) for name in chosen}
    for name, tokens in least.items():
        console.print(f"{name}: " + ("slower" if tokens is None else f"pays from {tokens} tokens"))
    if options.report:
        report = {"gains": [asdict(gain) for gain in gains], "pays_from": least, "title": title}
        report["environment"] = environment(*PACKAGES)
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(report, indent=2) + "\n")
    return 0

"""Simulate skip decisions whose harm is known, and print how often each test skips wrongly.

    python scripts/simulate_tests.py --seed 0
    python scripts/simulate_tests.py --repetitions 20 --json simulation.json

The false-skip rate is the mean over generations of harmful skips / skips, 0 where a generation has
none; alpha is what it should not exceed. Beside it stands the share of steps skipped: a test that
never skips is safe and useless. `oracle` knows the harm and skips all that is harmless.

The model. A generation has 24 decided steps, each a cell of its own. Its states are Gaussian, of
256 tokens x 128 channels (N*D = 32768). The true relative change at step t is
delta = epsilon * m_t * exp(0.1 a + 0.05 b_t), m_t rising from 0.5 to 2, a (of the generation) and
b_t (of the step) standard normal. A test sees Q/R = delta^2 * noise: tokens change alike within
each of P patches, along E directions, so noise is a chi-square of nu = P*E degrees of freedom over
nu. A skip is harmful where slope * delta * (1 + reaction * steps skipped in a row before it)
exceeds epsilon.

The worlds. `many dimensions`: nu = 64 * 11 = 704, slope 1. `few dimensions`: nu = 1 * 8.
`random slope`: nu = 704, and the slope of a generation is exp(0.3 * Student's t of 3 degrees): a
change does in some generations far more harm than in others. `states react`: nu = 704, reaction
0.1. Elsewhere reaction is 0.

The tests. Each step is judged by itself, its anchor taken to be the step before. `paper` and
`chi2, not calibrated` are the library's gate. `chi2, moment matched` takes nu of each cell from the
fit generations and slope 1. `chi2, calibrated` divides epsilon by the cell's fitted slope: over the
fit generations, the upper quantile of the true error on a full run / sqrt(Q/R). `conformal` skips
where that slope * sqrt(Q/R) < lambda * epsilon, lambda chosen on the calibration generations:
`once`, their states those of a full run; `twice`, chosen once more on the same generations, their
states those of a run that skips with the first lambda.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from xfuser_fastcache.calibration.risk import (
    chi2_factor,
    conformal_scale,
    degrees_of_freedom,
    least_generations,
)
from xfuser_fastcache.cli.flags import flags_of
from xfuser_fastcache.gates.base import Evidence
from xfuser_fastcache.gates.chi_square import ChiSquareGate
from xfuser_fastcache.reports.false_skips import false_skip_rate, harmful_share

TOKENS, DIM, STEPS = 256, 128, 24
EPSILON = 0.1
MEDIANS = np.linspace(0.5, 2.0, STEPS)
SCALES = np.geomspace(0.1, 4.0, 400)

# (generations, steps); floats for ratios, bools for flags.
Ratios = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class World:
    """How changes look and what harm they do.

    Attributes:
        patches: parts of a picture whose tokens change alike; divides `TOKENS`.
        directions: dimensions along which a patch changes, at most `DIM`.
        slope_spread: scale of the log of a generation's slope.
        reaction: by which share each step skipped in a row raises the next one's harm.
    """

    patches: int = 64
    directions: int = 11
    slope_spread: float = 0.0
    reaction: float = 0.0


WORLDS = {
    "many dimensions": World(),
    "few dimensions": World(patches=1, directions=8),
    "random slope": World(slope_spread=0.3),
    "states react": World(reaction=0.1),
}


@dataclass(frozen=True)
class Generations:
    """What is drawn of some generations; every field has shape `(generations, steps)`.

    Attributes:
        ratio: Q/R, which a test sees.
        unevenness: sum over tokens of q^2, over Q^2, which the gate sees.
        error: the true relative error of a skip on a full run, which no test sees.
        reaction: as in `World`.
    """

    ratio: Ratios
    unevenness: Ratios
    error: Ratios
    reaction: float

    def harm(self, skipped: Flags) -> Flags:
        """Return whether each step, skipped or not, does harm if skipped, given those before."""
        row = np.zeros(len(skipped))
        harmful = np.empty_like(skipped)
        for step in range(STEPS):
            harmful[:, step] = self.error[:, step] * (1 + self.reaction * row) > EPSILON
            row = np.where(skipped[:, step], row + 1, 0.0)
        return harmful

    def harmless(self) -> Flags:
        """Return what an oracle skips: each step that does no harm after its own earlier skips."""
        skipped = np.zeros(self.error.shape, dtype=bool)
        for step in range(STEPS):
            skipped[:, step] = ~self.harm(skipped)[:, step]
        return skipped


def draw(world: World, generations: int, rng: np.random.Generator) -> Generations:
    """Draw independent generations of a world."""
    shape = (generations, STEPS)
    effects = 0.1 * rng.standard_normal((generations, 1)) + 0.05 * rng.standard_normal(shape)
    change = EPSILON * MEDIANS * np.exp(effects)
    slope = np.exp(world.slope_spread * rng.standard_t(3, size=(generations, 1)))
    # Of each patch, its share of Q: a chi-square of `directions` degrees of freedom.
    patches = rng.gamma(world.directions / 2, size=(*shape, world.patches))
    total = patches.sum(axis=2)
    noise = total / (world.patches * world.directions / 2)
    tokens_per_patch = TOKENS / world.patches
    unevenness = (patches**2).sum(axis=2) / tokens_per_patch / total**2
    return Generations(change**2 * noise, unevenness, slope * change, world.reaction)


def gate_flags(seen: Generations, alpha: float, test: str) -> Flags:
    """Return what the library's gate decides without calibration."""
    gate = ChiSquareGate(EPSILON, alpha, test)
    reference = float(TOKENS * DIM)  # states of RMS 1
    return np.array(
        [
            gate.judge(
                Evidence(
                    change=ratio * reference,
                    change_squared=unevenness * (ratio * reference) ** 2,
                    reference=reference,
                    tokens=TOKENS,
                    dim=DIM,
                    lag=1,
                    noise_levels=(0.0, 1.0, None),  # this gate does not look at them
                )
            ).may_skip
            for ratio, unevenness in zip(seen.ratio.flat, seen.unevenness.flat, strict=True)
        ]
    ).reshape(seen.ratio.shape)


def scale_for(seen: Generations, shape: Ratios, alpha: float, skipped: Flags) -> float:
    """Choose lambda on calibration generations whose states are those of a run with these skips.

    Args:
        seen: the generations.
        shape: `(generations, steps)`, slope * sqrt(Q/R) / epsilon: a step is skipped where it is
            below lambda.
        alpha: the false-skip rate allowed.
        skipped: `(generations, steps)`, what the run skipped.
    """
    flags = shape[:, :, None] < SCALES
    harmful = flags & seen.harm(skipped)[:, :, None]
    return conformal_scale(harmful_share(harmful.sum(axis=1), flags.sum(axis=1)), SCALES, alpha)


def tests_of(
    fit: Generations, calibrate: Generations, alpha: float, slope_quantile: float
) -> dict[str, Callable[[Generations], Flags]]:
    """Return the tests by name, each from new generations to flags of skipped steps."""
    degrees = [degrees_of_freedom(cell) for cell in fit.ratio.T]
    limit = EPSILON**2 * np.array([chi2_factor(nu, alpha) for nu in degrees])
    slope = np.quantile(fit.error / np.sqrt(fit.ratio), slope_quantile, axis=0)

    def shape(seen: Generations) -> Ratios:
        return slope * np.sqrt(seen.ratio) / EPSILON

    full_run = np.zeros(calibrate.ratio.shape, dtype=bool)
    once = scale_for(calibrate, shape(calibrate), alpha, full_run)
    twice = scale_for(calibrate, shape(calibrate), alpha, shape(calibrate) < once)
    return {
        "paper": lambda seen: gate_flags(seen, alpha, "paper"),
        "chi2, not calibrated": lambda seen: gate_flags(seen, alpha, "chi2"),
        "chi2, moment matched": lambda seen: seen.ratio < limit,
        "chi2, calibrated": lambda seen: seen.ratio < limit / slope**2,
        "conformal, once": lambda seen: shape(seen) < once,
        "conformal, twice": lambda seen: shape(seen) < twice,
        "oracle": lambda seen: seen.harmless(),
    }


@dataclass(frozen=True)
class Row:
    """One test in one world, over repetitions.

    Attributes:
        world: name of the world.
        test: name of the test.
        false_skip_rate: mean over repetitions, a ratio.
        false_skip_low: lower end of its 95 % interval, normal approximation over repetitions.
        false_skip_high: upper end.
        skipped: share of the steps, a ratio, mean over repetitions.
        skipped_low: lower end of its 95 % interval.
        skipped_high: upper end.
    """

    world: str
    test: str
    false_skip_rate: float
    false_skip_low: float
    false_skip_high: float
    skipped: float
    skipped_low: float
    skipped_high: float


def interval(values: list[float]) -> tuple[float, float]:
    """Return a 95 % interval of the mean of independent repetitions, within [0, 1]."""
    half = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return max(float(np.mean(values)) - half, 0.0), min(float(np.mean(values)) + half, 1.0)


def simulate(options: argparse.Namespace) -> list[Row]:
    """Run all tests in all worlds; each repetition draws, fits, calibrates and checks anew."""
    rows = []
    for index, (name, world) in enumerate(WORLDS.items()):
        rng = np.random.default_rng([options.seed, index])
        rates: dict[str, list[float]] = {}
        shares: dict[str, list[float]] = {}
        for _ in track(
            range(options.repetitions), f"{name:16}", console=Console(stderr=True), transient=True
        ):
            fit = draw(world, options.fit, rng)
            calibrate = draw(world, options.calibrate, rng)
            fresh = draw(world, options.check, rng)
            tests = tests_of(fit, calibrate, options.alpha, options.slope_quantile)
            for test, decide in tests.items():
                skipped = decide(fresh)
                harmful = skipped & fresh.harm(skipped)
                rate = false_skip_rate(harmful.sum(axis=1), skipped.sum(axis=1))
                rates.setdefault(test, []).append(rate)
                shares.setdefault(test, []).append(float(skipped.mean()))
        rows += [
            Row(
                name,
                test,
                float(np.mean(rates[test])),
                *interval(rates[test]),
                float(np.mean(shares[test])),
                *interval(shares[test]),
            )
            for test in rates
        ]
    return rows


def show(rows: list[Row], options: argparse.Namespace, console: Console) -> None:
    """Print the rows as a table."""
    table = Table(
        title=f"alpha {options.alpha}, epsilon {EPSILON}, generations: {options.fit} fit, "
        f"{options.calibrate} calibrate, {options.check} check; {options.repetitions} repetitions, "
        f"seed {options.seed}"
    )
    for column in ("world", "test", "false-skip rate", "95 %", "steps skipped", "95 %"):
        table.add_column(column, justify="left" if column in ("world", "test") else "right")
    for row in rows:
        first = row.test == "paper"
        if first and table.rows:
            table.add_section()
        table.add_row(
            row.world if first else "",
            row.test,
            f"{row.false_skip_rate:.1%}",
            f"{row.false_skip_low:.1%} to {row.false_skip_high:.1%}",
            f"{row.skipped:.1%}",
            f"{row.skipped_low:.1%} to {row.skipped_high:.1%}",
        )
    console.print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: a wrong flag, or too few generations or repetitions.
    """
    flags = flags_of("scripts/simulate_tests.py", __doc__)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--alpha", type=float, default=0.05)
    flags.add_argument("--repetitions", type=int, default=300)
    flags.add_argument("--fit", type=int, default=50, help="generations that fit the cells")
    flags.add_argument("--calibrate", type=int, default=100, help="generations that choose lambda")
    flags.add_argument("--check", type=int, default=50, help="new generations a repetition")
    flags.add_argument(
        "--slope_quantile", type=float, default=0.9, help="of the slopes over fit generations"
    )
    flags.add_argument("--json", type=Path, help="also write options and rows to this file")
    options = flags.parse_args(arguments)
    if not 0 < options.alpha < 1 or not 0 < options.slope_quantile < 1:
        flags.error("--alpha and --slope_quantile must lie between 0 and 1, exclusive")
    if options.calibrate < least_generations(options.alpha):
        flags.error(
            f"--calibrate {options.calibrate}: alpha = {options.alpha} needs at least "
            f"{least_generations(options.alpha)}"
        )
    if min(options.fit, options.repetitions) < 2 or options.check < 1:
        flags.error("--fit and --repetitions must be at least 2, --check at least 1")
    return options


def main(arguments: list[str]) -> int:
    """Simulate, print the table, and write the JSON file asked for; return the exit status."""
    options = parse(arguments)
    rows = simulate(options)
    show(rows, options, Console(width=120))
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        report = {"options": settings, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0

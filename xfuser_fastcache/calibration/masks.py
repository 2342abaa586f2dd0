"""Which steps to compute: masks proposed by a search, steered, and tried on whole generations."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from xfuser_fastcache.artifacts.calibration import Fitted, load_fitted
from xfuser_fastcache.calibration import build
from xfuser_fastcache.calibration.options import CalibrationOptions
from xfuser_fastcache.calibration.runs import Runs, saved
from xfuser_fastcache.calibration.search import MaskSearch, step_impact
from xfuser_fastcache.calibration.steering import FullRun, Observer, SteeringForecaster
from xfuser_fastcache.clock.schedule import even_mask
from xfuser_fastcache.reports.progress import Progress

# Generations that the impact of steps is measured on, and that corrections are tried on.
IMPACT, TRIED = 2, 6
# Share of a batch that a mask's corrections are fitted on; the others try it.
FITTED = 0.6
# Masks drawn in search of one that was not tried yet.
DRAWS = 100


class MaskTrials:
    """Finds the masks of a calibration, and their corrections.

    Masks are proposed by `MaskSearch`, evenly spaced, and taken from a calibration that is to be
    bettered; each is run on a batch of generations, with corrections fitted on some of them
    (`SteeringForecaster`), and judged by the others: a smaller error of each forecast need not make
    a better picture. From the best mask on, steps are moved at random, and what helps is kept.

    Args:
        runs: the pipeline.
        options: of the calibration.
        fitted: the calibration so far.
        parts: the records.
        given: masks to better, by number of computed steps.
        progress: shows it.
    """

    def __init__(
        self,
        runs: Runs,
        options: CalibrationOptions,
        fitted: Fitted,
        parts: build.Parts,
        given: dict[int, list[int]],
        progress: Progress,
    ):
        self.runs, self.options, self.progress = runs, options, progress
        self.fitted, self.parts = fitted, parts
        self.given = given
        self.steps = len(fitted.noise_levels)
        self.batch = list(range(min(options.batch_size, len(runs.prompts))))
        # How many of them weights are fitted on; the others try a mask.
        self.fits = min(max(1, round(FITTED * len(self.batch))), len(self.batch) - 1)
        self.full, self.reference = self._full_run()
        self.guided = self._told(self.full is not None and len(self.full.outputs[0]) == 2)
        self._steered: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def search(self) -> tuple[Fitted, dict[str, Any]]:
        """Return the calibration with masks, its cells without corrections where they lost."""
        options, runs = self.options, self.runs
        budgets = sorted(options.computed_steps, reverse=True)
        kinds = {
            "corrected": self.fitted,
            "plain": runs.team.agreed(lambda: build.without_corrections(self.fitted, self.parts)),
        }
        even = {kind: self._tried_evenly(candidate, budgets) for kind, candidate in kinds.items()}
        mean = {kind: float(np.mean(list(found.values()))) for kind, found in even.items()}
        chosen = runs.team.agreed(lambda: max(mean, key=mean.__getitem__))
        seeker = MaskSearch(
            build.flat(self.parts.fit),
            self.fitted.noise_levels,
            kinds[chosen].weights,
            self._impact(),
        )
        masks: dict[int, list[int]] = {}
        report: dict[str, Any] = {}
        for budget in self.progress.track(budgets, "masks"):
            proposed = {
                "searched": runs.team.agreed(functools.partial(seeker.best, budget)),
                "even": even_mask(self.steps, budget),
                "even, last skipped": even_mask(self.steps, budget, last=False),
            }
            if budget in self.given:
                proposed["given"] = self.given[budget]
            found = {name: (self.steered(mask), mask) for name, mask in proposed.items()}
            best = max(found.values())
            value, masks[budget] = improved(*best, options.moves, self.steered, options.seed)
            report[str(budget)] = {
                **{f"{kind}, even": even[kind][budget] for kind in kinds},
                **{f"steered, {name}": snr for name, (snr, _) in found.items()},
                "steered, moved": value,
            }
        tables: dict[str, Any] = {
            name: np.stack(rows)
            for name, rows in self._corrections([masks[count] for count in sorted(masks)]).items()
        }
        fitted = replace(kinds[chosen], masks=masks, **tables)
        return fitted, {"chosen": chosen, "latent_snr_db": report}

    def _corrections(self, masks: list[list[int]]) -> dict[str, list[NDArray[np.float32]]]:
        """Return corrections for the chosen masks, by their names in the file."""
        tried = [self._steered[tuple(mask)] for mask in masks]
        found = {"steering_guided" if self.guided else "steering": tried}
        if self.guided:
            found["steering"] = [self._run(mask)[1] for mask in masks]
        return found

    def steered(self, mask: list[int]) -> float:
        """Fit corrections for a mask; return what it makes of the generations held out, in dB."""
        value, self._steered[tuple(mask)] = self._run(mask, by_branch=self.guided)
        return value

    def _told(self, known: Any) -> Any:
        """Return what a rank knows of the full run, which all of them know."""
        return known

    def _run(self, mask: list[int], by_branch: bool = False) -> tuple[float, NDArray[np.float32]]:
        """Return how a mask does with corrections fitted as it runs, in dB, and these."""
        assert self.full is not None
        with self._observer() as observer:
            forecaster = SteeringForecaster(self.full, observer, by_branch)
            found = self.runs.latents(*self.batch, forecaster=forecaster, steps_mask=mask)
        return self._judged(found), forecaster.found

    def _judged(self, found: torch.Tensor) -> float:
        """Return how near the latents that try a mask are to those of full computation, in dB."""
        rows = range(self.fits, len(self.batch))
        value = float(np.mean([ratio_db(found[i], self.reference[i]) for i in rows]))
        return self.runs.team.agreed(lambda: value)

    def _observer(self) -> Observer:
        runs = self.runs
        count, tokens = len(self.batch), self.options.max_tokens
        return Observer(runs.pipe.transformer, count, tokens, runs.team)

    def _full_run(self) -> tuple[FullRun | None, torch.Tensor]:
        with self._observer() as observer:
            final = self.runs.latents(*self.batch)
        calls = len(observer.outputs)
        if calls != self.steps:
            raise ValueError(
                f"{calls} calls of the transformer in {self.steps} steps: masks are searched where "
                "guidance comes in one call a step; leave --computed_steps out"
            )
        return FullRun.of(observer, final, self.fits), final

    def _tried_evenly(self, candidate: Fitted, budgets: list[int]) -> dict[int, float]:
        """Return how the corrections of cells do with even masks, by number of computed steps."""
        first = len(self.parts.fit)
        tried = range(first, first + min(TRIED, len(self.parts.held_out)))
        with saved(candidate) as path:

            def ratios(index: int) -> list[float]:
                reference = self.runs.latents(index)
                masks = [even_mask(self.steps, budget) for budget in budgets]
                cached = [
                    self.runs.latents(index, calibration=path, steps_mask=mask) for mask in masks
                ]
                return [ratio_db(one, reference) for one in cached]

            found = list(self.runs.team.shared_out(tried, ratios))
        return dict(zip(budgets, np.mean(found, axis=0).tolist(), strict=True))

    def _impact(self) -> np.ndarray:
        """Return by how much an error of the output at each step moves the final latents."""
        team, folder = self.runs.team, self.runs.folder
        cached = folder / "impact.npy" if folder else None
        known = team.agreed(lambda: np.load(cached) if cached and cached.exists() else None)
        if known is not None:
            return known
        references = [self.runs.latents(i) for i in range(IMPACT)]

        def distances(step: int) -> list[float]:
            mask = [int(s != step) for s in range(self.steps)]
            made = [self.runs.latents(i, steps_mask=mask) for i in range(IMPACT)]
            pairs = zip(made, references, strict=True)
            return [float((a - b).double().square().mean().sqrt()) for a, b in pairs]

        steps = range(1, self.steps)
        drawn = team.shared_out(steps, distances)
        tracked = self.progress.track(drawn, "impact of steps", len(steps))
        moved = np.array([[0.0] * IMPACT, *tracked])
        records = build.flat(self.parts.fit[:IMPACT])
        impact = team.agreed(lambda: step_impact(moved.T, records, self.fitted.noise_levels))
        if cached is not None and team.first:
            np.save(cached, impact)
        return impact


def given_masks(path: Path | None, steps: int) -> dict[int, list[int]]:
    """Return the masks of the calibration that a search starts from; none without one.

    Raises:
        ValueError: it is none, or one for another number of steps.
    """
    if path is None:
        return {}
    given = load_fitted(path)
    if len(given.noise_levels) != steps:
        raise ValueError(
            f"--start_from {str(path)!r} has masks of {len(given.noise_levels)} steps, and this "
            f"run has {steps}"
        )
    return given.masks


def improved(
    value: float, mask: list[int], moves: int, of: Callable[[list[int]], float], seed: int
) -> tuple[float, list[int]]:
    """Move computed steps at random, and keep what raises the value, for so many tries.

    Returns:
        The highest value, and its mask.
    """
    rng, seen = random.Random(seed), {tuple(mask)}
    for _ in range(moves):
        drawn = (moved(mask, rng) for _ in range(DRAWS))
        fresh = next((candidate for candidate in drawn if tuple(candidate) not in seen), None)
        if fresh is None:
            break
        seen.add(tuple(fresh))
        found = of(fresh)
        if found > value:
            value, mask = found, fresh
    return value, mask


def moved(mask: list[int], rng: random.Random) -> list[int]:
    """Return a mask with one or two of its computed steps, but not the first, moved to free ones.

    By one step or two; where that place is taken, the step stays.
    """
    found = list(mask)
    for _ in range(rng.choice((1, 1, 2))):
        places = [step for step in range(1, len(found)) if found[step]]
        if not places:
            break
        step = rng.choice(places)
        to = step + rng.choice((-2, -1, -1, 1, 1, 2))
        if 0 < to < len(found) and not found[to]:
            found[step], found[to] = 0, 1
    return found


def ratio_db(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Signal-to-noise ratio of final latents against those of full computation, in dB."""
    error = (found.double() - wanted.double()).square().mean().clamp_min(1e-20)
    return float(10 * torch.log10(wanted.double().square().mean() / error))


def print_masks(report: dict[str, Any], fitted: Fitted, console: Console) -> None:
    """Print how the tried masks did, and which steps the chosen ones compute."""
    table = Table(
        title="final latents against full computation, dB; corrections of cells: "
        + ("kept" if report["chosen"] == "corrected" else "dropped")
    )
    columns = ("corrected, even", "plain, even", "steered, best", "steps moved")
    for name in ("computed", *columns, "chosen steps"):
        table.add_column(name, justify="right")
    for budget, found in report["latent_snr_db"].items():
        proposed = [db for name, db in found.items() if name.startswith("steered")]
        values = (
            found["corrected, even"],
            found["plain, even"],
            max(proposed[:-1]),
            found["steered, moved"],
        )
        steps = [step for step, flag in enumerate(fitted.masks[int(budget)]) if flag]
        table.add_row(budget, *(f"{db:.1f}" for db in values), " ".join(map(str, steps)))
    console.print(table)

"""Milliseconds a step, uncached and cached, in interleaved rounds."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch

from xfuser_fastcache.apply import get_cache_statistics
from xfuser_fastcache.benchmarks.gpu.record import Record
from xfuser_fastcache.benchmarks.gpu.subject import Subject, computed_mask, same_bits

# Small enough to refuse every change, and not the 0 that needs no test.
NEVER = 1e-9
SKIPPED = (0.5, 0.64, 0.75, 0.82)
# Where one generation takes long.
SKIPPED_LONG = (0.64,)
FORECASTERS = ("output", "data", "damped_taylor")
UNCACHED, MEASURES, ZERO = "uncached", "gate never passes", "threshold 0"


def variants(steps: int, skipped: tuple[float, ...]) -> dict[str, dict[str, Any] | None]:
    """Return the options of each variant; None for uncached."""
    found: dict[str, dict[str, Any] | None] = {
        UNCACHED: None,
        MEASURES: {"cache_ratio_threshold": NEVER},
    }
    for share in skipped:
        for forecaster in FORECASTERS:
            found[f"{forecaster}, {share:.0%} skipped"] = {
                "forecaster": forecaster,
                "steps_mask": computed_mask(steps, share),
            }
    return found


def warm_up(subject: Subject) -> None:
    """Run every kind of step once, so that no timed one is the first of its kind."""
    subject.denoise(3)
    for forecaster in FORECASTERS:
        with subject.cached(forecaster=forecaster, steps_mask=[1, 1, 0, 1]):
            subject.denoise(4)


class Rounds:
    """Rounds of one generation a variant, so that a drift of the card meets all alike.

    Args:
        record: takes a cell a variant.
        name: of the cells.
        subject: is measured.
        options: of each variant, the first one uncached.
    """

    def __init__(
        self,
        record: Record,
        name: str,
        subject: Subject,
        options: dict[str, dict[str, Any] | None],
    ):
        self.record = record
        self.name = name
        self.subject = subject
        self.options = options
        self.times: dict[str, list[float]] = {variant: [] for variant in options}
        self.ratios: dict[str, list[float]] = {variant: [] for variant in options}
        self.digests: dict[str, set[str]] = {variant: set() for variant in options}
        self.pictures: dict[str, torch.Tensor] = {}
        self.repeats: dict[str, bool] = {}
        self.failed: set[str] = set()

    @property
    def uncached_ms(self) -> float:
        """Milliseconds of an uncached step; 0 where that is not known."""
        return median(self.times[UNCACHED]) if self.times[UNCACHED] else 0.0

    def run(self, rounds: int) -> None:
        """Run so many rounds, each in the other order than the one before."""
        for index in range(rounds):
            order = [variant for variant in self.options if variant not in self.failed]
            # The uncached run leads, since the others of its round are compared with it.
            rest = [variant for variant in order if variant != UNCACHED]
            for variant in [UNCACHED] * (UNCACHED in order) + rest[:: -1 if index % 2 else 1]:
                steps = self.subject.steps
                needs_s = 1.2 * self.uncached_ms * steps / 1000
                if self.times[variant] and self.record.left_s <= needs_s:
                    continue
                done = self.record.measure(
                    self.subject.name,
                    self.name,
                    variant,
                    partial(self.once, variant),
                    needs_s,
                )
                if not done:
                    self.failed.add(variant)

    def once(self, variant: str) -> dict[str, Any]:
        """Run one generation of a variant, and return all of its figures so far."""
        options = self.options[variant]
        statistics: dict[str, Any] = {}
        with nullcontext() if options is None else self.subject.cached(**options):
            ms, latents = self.subject.timed()
            if options is not None:
                statistics = get_cache_statistics(self.subject.model)
        self.times[variant].append(ms)
        first = self.pictures.setdefault(variant, latents)
        self.repeats[variant] = self.repeats.get(variant, True) and same_bits(first, latents)
        if self.times[UNCACHED]:
            self.ratios[variant].append(self.times[UNCACHED][-1] / ms)
        return self.figures(variant, statistics)

    def figures(self, variant: str, statistics: dict[str, Any]) -> dict[str, Any]:
        """Return what is known of a variant.

        Args:
            variant: its name.
            statistics: of its last generation; empty where uncached.
        """
        found: dict[str, Any] = {
            "ms_a_step": median(self.times[variant]),
            "ms_of_each_run": self.times[variant],
            "repeats_to_the_bit": self.repeats[variant],
            "finite": bool(self.pictures[variant].isfinite().all()),
        }
        ratios = self.ratios[variant]
        if self.options[variant] is None or not ratios:
            return found
        self.digests[variant].add(statistics["decisions_digest"])
        speedup = median(ratios)
        found |= {
            "speedup": speedup,
            "speedup_of_each_run": ratios,
            "share_skipped": statistics["block_approx_ratio"],
            "digests": len(self.digests[variant]),
            "cache_bytes": statistics["cache_bytes"],
            "nonfinite_steps": statistics["nonfinite_steps"],
        }
        mask = (self.options[variant] or {}).get("steps_mask")
        if mask is None:
            found["ms_added"] = median(self.times[variant]) - self.uncached_ms
            if UNCACHED in self.pictures:
                found["identical_to_uncached"] = same_bits(
                    self.pictures[UNCACHED], self.pictures[variant]
                )
            return found
        share = statistics["block_approx_ratio"]
        # Of what was skipped: a statistic that overflows has a step computed that the mask skips.
        ideal = 1 / (1 - share)
        return found | {
            "computed_steps": sum(mask),
            "skipped_as_planned": abs(share - (1 - sum(mask) / len(mask))) < 1e-6,
            "ideal_speedup": ideal,
            "share_of_ideal": speedup / ideal,
            "share_of_ideal_fastest": min(self.times[UNCACHED]) / min(self.times[variant]) / ideal,
            "differs_from_uncached": UNCACHED in self.pictures
            and not same_bits(self.pictures[UNCACHED], self.pictures[variant]),
        }

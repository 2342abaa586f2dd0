"""Counters of what the cache did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.consensus.collective import Usage
from xfuser_fastcache.reports.false_skips import false_skip_interval, false_skip_rate

# Generations whose audits are remembered; older ones are forgotten.
AUDITED = 512


@dataclass(frozen=True)
class BlockInfo:
    """One block of the whole model, also where another pipeline stage holds it.

    Attributes:
        name: qualified name in the unsplit model, such as `single_transformer_blocks.3`.
        span: index of the span it belongs to.
        cost: its share of the cost of all blocks (0 to 1), by parameters.
    """

    name: str
    span: int
    cost: float


class Counters:
    """Counts since they were made; decisions go on untouched when they are made anew.

    Args:
        usage: of the wire when counting begins.
        spans: number of flags in a decision.

    Attributes:
        carried_keys: forward passes of a PipeFusion patch that attended to other patches' keys and
            values carried on over skipped steps.
        recomputed: forward passes that ran again, since a forecast had found no place in them.
        forced_beyond_budget: steps of a branch that were computed where a budget skips them, since
            nothing could be forecast.
        nonfinite_steps: decisions that found a statistic NaN, infinite or overflowing.
        peak_bytes: most bytes that this rank's anchors, and fitted maps, occupied.
    """

    def __init__(self, usage: Usage, spans: int):
        self._before = usage
        self.carried_keys = 0
        self.forced_beyond_budget = 0
        self.nonfinite_steps = 0
        self.recomputed = 0
        self.peak_bytes = 0
        self._generations = 0
        self._steps = 0
        self._step: int | None = None  # of the last decision
        self._decisions = 0
        self._skipped = [0] * spans
        # Of each block: shares of tokens, and of its cost, that a token plan saved.
        self._left_out: dict[int, float] = {}
        self._saved: dict[int, float] = {}
        # For all skips: what was computed all the same, as shares of the cost of all blocks.
        self._spent = 0.0
        # Generation -> harmful skips among the audited ones, and these.
        self._audits: dict[int, tuple[int, int]] = {}

    def record(self, call: Call, skip: list[bool]) -> None:
        """Count one decision: a step of one branch, one flag per span."""
        self._decisions += 1
        begins = call.step == call.entered and call.branch == 0
        # The first branch may be left out of a step.
        self._steps += begins or call.step != self._step
        self._generations += begins
        self._step = call.step
        for span, skipped in enumerate(skip):
            self._skipped[span] += skipped

    def record_narrowed(self, block: int, left_out: float, saved: float) -> None:
        """Count a block that ran on fewer tokens.

        Args:
            block: its index in the whole model.
            left_out: share of the image tokens that it did not run on, 0 to 1.
            saved: share of its cost that this saved, 0 to 1.
        """
        self._left_out[block] = self._left_out.get(block, 0.0) + left_out
        self._saved[block] = self._saved.get(block, 0.0) + saved

    def record_forecast(self, spent: float) -> None:
        """Count what was computed for a skip or for static tokens: a share of all blocks' cost."""
        self._spent += spent

    def record_recomputed(self) -> None:
        """Count a forward pass that ran again, since a forecast had found no place in it."""
        self.recomputed += 1
        self.record_forecast(1.0)

    def record_audit(self, generation: int, harmful: bool) -> None:
        """Count a skip whose error was measured."""
        before, audited = self._audits.pop(generation, (0, 0))
        self._audits[generation] = before + harmful, audited + 1
        if len(self._audits) > AUDITED:
            del self._audits[next(iter(self._audits))]

    def saw_bytes(self, held: int) -> None:
        """Note how many bytes this rank's anchors, and fitted maps, occupy."""
        self.peak_bytes = max(self.peak_bytes, held)

    def audits(self) -> dict[str, Any]:
        """Return what the last `AUDITED` generations that had audits say; see `as_dict`."""
        harmful, audited = ([pair[i] for pair in self._audits.values()] for i in (0, 1))
        return {
            "audits": sum(audited),
            "false_skip_rate": false_skip_rate(harmful, audited) if audited else None,
            "false_skip_interval": false_skip_interval(harmful, audited) if audited else None,
        }

    def as_dict(self, blocks: list[BlockInfo], usage: Usage) -> dict[str, Any]:
        """Return the counts under the names of `get_cache_statistics`.

        `block_approx_ratio` is the share of blocks that were skipped, `spatial_approx_ratio` the
        share of tokens in blocks that were not: no work counts in both, and their sum is what was
        not computed. `estimated_flops_saved_ratio` is the share of the cost of blocks that this
        saves, less what fitted maps and audits cost. Ratios are between 0 and 1, times in seconds,
        sizes in bytes. `audits` are skips whose error was measured, over the last `AUDITED`
        generations that had any, and `false_skip_rate` is of those; None where there are none.

        Args:
            blocks: of the whole model, in order.
            usage: of the wire by now.
        """
        decided = self._decisions
        table = {}
        for block in blocks:
            skipped = self._skipped[block.span]
            table[block.name] = {
                "computed": decided - skipped,
                "skipped": skipped,
                "hit_ratio": skipped / decided if decided else 0.0,
            }
        collectives = usage.collectives - self._before.collectives
        return {
            "steps": self._steps,
            "generations": self._generations,
            "block_approx_ratio": sum(row["hit_ratio"] for row in table.values()) / len(table),
            "spatial_approx_ratio": (
                sum(self._left_out.values()) / (decided * len(blocks)) if decided else 0.0
            ),
            "blocks": table,
            "estimated_flops_saved_ratio": sum(
                block.cost
                * (table[block.name]["hit_ratio"] + self._saved.get(index, 0.0) / max(decided, 1))
                for index, block in enumerate(blocks)
            )
            - self._spent / max(decided, 1),
            "collectives": collectives,
            "collectives_per_step": collectives / decided if decided else 0.0,
            "consensus_wait_s": usage.wait_s - self._before.wait_s,
            "cache_bytes": self.peak_bytes,
            **self.audits(),
            "forced_beyond_budget": self.forced_beyond_budget,
            "nonfinite_steps": self.nonfinite_steps,
            "recomputed": self.recomputed,
            "carried_keys": self.carried_keys,
        }

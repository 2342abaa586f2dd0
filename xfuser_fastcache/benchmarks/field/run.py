"""The order of cells of a field test, on every rank; rank 0 writes each before the next begins."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from xfuser_fastcache.benchmarks.field.scrubbing import Scrubber
from xfuser_fastcache.benchmarks.field.together import REFUSED, Outcome, Together
from xfuser_fastcache.benchmarks.gpu.machine import describe
from xfuser_fastcache.benchmarks.gpu.record import ERROR, LEFT_OUT, OK, Figures, Record
from xfuser_fastcache.benchmarks.gpu.subject import computed_mask
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.reports.measured import compared
from xfuser_fastcache.xdit.generator import Generator, Run, images_of
from xfuser_fastcache.xdit.loaded import load_in_layout

SCHEMA = 1
UNCACHED, ZERO = "uncached", "threshold 0"
# Share of a mask's steps that it skips.
SKIPPED = 0.64
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        options: flags of xDiT's, with the prompts.
        given: those of them that were given and may be told, by name.
        configs: of each cached variant.
        rounds: of interleaved generations, at most.
        budget_s: seconds for everything, loading included.
        output: the JSON file.
    """

    options: argparse.Namespace
    given: dict[str, Any]
    configs: dict[str, CacheConfig]
    rounds: int
    budget_s: float
    output: Path


def default_configs(steps: int) -> dict[str, CacheConfig]:
    """Return what is compared where the user names no cache: the gate, and a mask for two
    forecasts, whose share of skipped steps is the same on every model."""
    mask = computed_mask(steps, SKIPPED)
    return {
        "Fast": CacheConfig(use_cache="Fast"),
        "mask, output": CacheConfig(forecaster="output", steps_mask=mask),
        "mask, damped_taylor": CacheConfig(forecaster="damped_taylor", steps_mask=mask),
    }


def run(plan: Plan) -> bool:
    """Measure all that the time allows; every rank makes this call, once its process is a rank.

    Returns:
        Whether the model was loaded, no cell ended with an error and all had their turn.
    """
    options = plan.options
    leads = os.environ["RANK"] == "0"
    scrub = _scrubber(plan)
    record = Record(plan.output, scrub(_head(plan)), plan.budget_s) if leads else None
    field = FieldTest(plan, record, scrub)
    if field.load(lambda: load_in_layout(options, options.dtype)):
        field.generations()
    finished = field.finish()
    return bool(field.together.agreed(finished))


def _scrubber(plan: Plan) -> Scrubber:
    options = plan.options
    prompts = [*options.prompt, *np.atleast_1d(options.negative_prompt or [])]
    texts = [text for c in plan.configs.values() for text in _texts(c.to_dict()) if os.sep in text]
    named = [options.gguf, options.download_dir, options.config, *texts]
    if Path(options.model).exists():
        named.append(options.model)
    return Scrubber.of(map(str, prompts), filter(None, named))


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for entry in value.values() for text in _texts(entry)]
    return [value] if isinstance(value, str) else []


def _head(plan: Plan) -> dict[str, Any]:
    options = plan.options
    here = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    device, machine = describe(here)
    ranks = int(os.environ["WORLD_SIZE"])
    return {
        "schema": SCHEMA,
        "command": "fastcache fieldtest",
        "device": device,
        "machine": machine,
        # A folder's name is the user's own.
        "model": None if Path(options.model).exists() else options.model,
        "layout": {
            "ranks": ranks,
            "ranks_a_machine": int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
            "ulysses": options.ulysses_degree,
            "ring": options.ring_degree,
            "pipefusion": options.pipefusion_parallel_degree,
            "cfg": 2 if options.use_cfg_parallel else 1,
            "data": options.data_parallel_degree,
            "tensor": options.tensor_parallel_degree,
        },
        "flags": plan.given,
        "prompts": len(options.prompt),
        "configs": {name: config.to_dict() for name, config in plan.configs.items()},
    }


class FieldTest:
    """One model, measured on this rank.

    Args:
        plan: what to measure.
        record: on rank 0; None on the others.
        scrub: takes out what must not be told.
    """

    def __init__(self, plan: Plan, record: Record | None, scrub: Scrubber):
        self.plan = plan
        self.record = record
        self.scrub = scrub
        self.together = Together(plan.budget_s, self._cut_off)
        self.family = "model"
        self.generator: Generator | None = None
        self._runs: dict[str, list[list[Run]]] = {}
        self._running: tuple[str, str] = ("load", "all")
        self._replicas: list[int] = [0]
        # Wall time of the longest generation so far, in seconds.
        self._needs_s = 0.0

    # ---- cells ----------------------------------------------------------------------------------

    def load(self, loader: Callable[[], Any]) -> bool:
        """Load the pipeline; return whether every rank has it."""

        def task() -> Figures:
            begun = time.perf_counter()
            pipe = loader()
            self.generator = Generator(pipe, self.plan.options)
            seconds = time.perf_counter() - begun
            return {"seconds": seconds, "replica": self.generator.replica, **described(pipe)}

        outcomes = self._cell("load", "all", task)
        if any(outcome.status != OK for outcome in outcomes):
            return False
        found = [outcome.value for outcome in outcomes]
        self._replicas = [figures["replica"] for figures in found]
        figures = {name: found[0][name] for name in ("pipeline", "transformer", "scheduler")}
        for name in ("seconds", "replica", "device", "backend", "dtype", "formats"):
            figures[f"{name}_of_each_rank"] = [each[name] for each in found]
        self.family = figures["transformer"]
        self._put("load", "all", figures)
        return True

    def generations(self) -> None:
        """Warm up, then draw by every variant in turn, as often as the time allows."""
        assert self.generator is not None, "the pipeline is loaded"
        steps = self.plan.options.num_inference_steps
        warm = {"num_inference_steps": min(WARM_UP_STEPS, steps)}
        outcomes = self._cell("warm-up", "all", partial(self._generate, None, warm))
        if any(outcome.status != OK for outcome in outcomes):
            return
        self._put("warm-up", "all", {})
        zero = CacheConfig(use_cache="Fast", cache_ratio_threshold=0)
        variants: dict[str, CacheConfig | None] = {UNCACHED: None, ZERO: zero, **self.plan.configs}
        for number in range(self.plan.rounds):
            for variant, config in list(variants.items()):
                if not self.together.agreed(self.together.left_s > 1.3 * self._needs_s + 1.0):
                    self._leave_out(variants, number)
                    return
                if not self._speed(variant, config):
                    del variants[variant]
            if UNCACHED not in variants:
                return
            # Once is enough to see whether it is the uncached picture.
            variants.pop(ZERO, None)

    def finish(self) -> bool:
        """Write the report as finished; return whether all went well (rank 0 alone knows)."""
        self.together.close()
        if self.record is None:
            return True
        self.record.write(finished=True)
        cells = self.record.as_dict(True)["cells"]
        loaded = any(cell["cell"] == "load" and cell["status"] == OK for cell in cells)
        return loaded and not any(cell["status"] == ERROR for cell in cells)

    # ---- parts ----------------------------------------------------------------------------------

    def _speed(self, variant: str, config: CacheConfig | None) -> bool:
        drawn: list[Run] = []
        task = partial(self._generate, config, {}, drawn)
        count = len(self._runs.get(variant, ())) + 1
        outcomes = self._cell("speed", variant, task, f"{variant} {count}")
        if any(outcome.status != OK for outcome in outcomes):
            return False
        assert self.generator is not None
        ranks = self.generator.gather(drawn[0])
        if ranks:
            self._runs.setdefault(variant, []).append(ranks)
            self._put("speed", variant, self._figures(variant))
        return True

    def _generate(
        self, config: CacheConfig | None, changes: dict[str, Any], drawn: list[Run] | None = None
    ) -> None:
        assert self.generator is not None
        begun = time.monotonic()
        done = self.generator.run("", config, **changes)
        self._needs_s = max(self._needs_s, time.monotonic() - begun)
        if drawn is not None:
            drawn.append(done)

    def _figures(self, variant: str) -> Figures:
        steps = self.plan.options.num_inference_steps
        rounds = self._runs[variant]
        seconds = [max(run.seconds for run in ranks) for ranks in rounds]
        last = rounds[-1]
        figures: Figures = {
            "ms_a_step": 1000 * statistics.median(seconds) / steps,
            "seconds_of_each_run": seconds,
            "peak_bytes_of_each_rank": [_peak(runs) for runs in zip(*rounds, strict=True)],
            "finite": all(bool(np.isfinite(image).all()) for image in images_of(last)),
            "repeats_to_the_bit": _same(images_of(last), images_of(rounds[0]))
            if len(rounds) > 1
            else None,
        }
        if variant == UNCACHED:
            return figures
        plain = self._runs[UNCACHED]
        of_plain = [max(run.seconds for run in ranks) for ranks in plain]
        ratios = [uncached / own for uncached, own in zip(of_plain, seconds, strict=False)]
        digests = [run.statistics["decisions_digest"] for run in last]
        of_replicas = set(zip(self._replicas, digests, strict=True))
        found = last[0].statistics
        skipped = found["block_approx_ratio"]
        return {
            **figures,
            "speedup": statistics.median(ratios),
            "speedup_of_each_round": ratios,
            "share_skipped": skipped,
            # Of the speedup that skipping so many blocks for nothing would give.
            "share_of_ideal": statistics.median(ratios) * (1 - skipped),
            **compared(images_of(last), images_of(plain[0])),
            "digest_of_each_rank": digests,
            "digests_agree": len(of_replicas) == len(set(self._replicas)),
            "cache_bytes": found["cache_bytes"],
            "collectives_per_step": found["collectives_per_step"],
            "recomputed": found["recomputed"],
            "clock": found["clock"],
        }

    def _leave_out(self, variants: dict[str, Any], number: int) -> None:
        """Note what no generation was made of."""
        reason = f"the budget has {self.together.left_s:.0f} s left; a generation may not fit"
        for variant in variants if number == 0 else ():
            if self.record is not None and variant not in self._runs:
                self.record.put(self.family, "speed", variant, {}, LEFT_OUT, reason)

    def _cell(
        self, cell: str, variant: str, task: Callable[[], Any], key: str = ""
    ) -> list[Outcome]:
        """Run a cell everywhere, and note it where it is refused or an error."""
        self._running = (cell, variant)
        outcomes = self.together.run(f"{cell} {key}", task)
        worst = [o for status in (REFUSED, ERROR) for o in outcomes if o.status == status]
        if worst and self.record is not None:
            said = dict.fromkeys(
                (outcome.status, outcome.reason) for outcome in outcomes if outcome.reason
            )
            counts = Counter((o.status, o.reason) for o in outcomes)
            reasons = [
                text if len(outcomes) == 1 else f"{counts[status, text]} rank(s): {text}"
                for status, text in said
            ]
            self._put(cell, variant, {}, worst[-1].status, "\n".join(reasons))
        return outcomes

    def _put(
        self, cell: str, variant: str, figures: Figures, status: str = OK, reason: str | None = None
    ) -> None:
        if self.record is not None:
            scrubbed = self.scrub(figures), status, self.scrub(reason)
            self.record.put(self.family, cell, variant, *scrubbed)

    def _cut_off(self, status: str, reason: str) -> None:
        """Write what there is; called by a thread that watches, as the last thing."""
        cell, variant = self._running
        if variant not in self._runs:
            self._put(cell, variant, {}, status, f"cut off: {reason}")
        if self.record is not None:
            self.record.write(finished=False)


def described(pipe: Any) -> Figures:
    """Return what a rank holds: classes, and how many parameters of which format."""
    transformer = pipe.transformer
    model = getattr(transformer, "module", transformer)
    formats: Counter[str] = Counter()
    for parameter in model.parameters():
        tensor = parameter.data
        plain = type(tensor) is torch.Tensor and type(parameter) is torch.nn.Parameter
        kind = str(tensor.dtype).removeprefix("torch.") if plain else type(parameter).__name__
        if not plain and kind == "Parameter":
            kind = type(tensor).__name__
        formats[kind] += parameter.numel()
    on_gpu = torch.cuda.is_available()
    return {
        "pipeline": type(pipe.module).__name__,
        "transformer": type(model).__name__,
        "scheduler": type(getattr(pipe.scheduler, "module", pipe.scheduler)).__name__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "backend": dist.get_backend(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "formats": dict(formats),
    }


def _peak(runs: Iterable[Run]) -> int | None:
    return max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None)


def _same(images: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return len(images) == len(others) and all(map(np.array_equal, images, others))

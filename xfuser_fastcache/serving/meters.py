"""What a service counts, once: GET /statistics gives it as JSON, GET /metrics for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

OUTCOMES = ("done", "refused", "full", "timed_out", "failed", "stopping", "hung_up")
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Meters:
    """Counters of one service.

    Args:
        waiting: returns how many requests wait.
        running: returns how many are drawn, 0 or 1.
    """

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]):
        self.registry = CollectorRegistry()
        self.started = time.time()
        self.last: dict[str, Any] = {}
        ProcessCollector(registry=self.registry)
        own: dict[str, Any] = {"registry": self.registry, "namespace": "fastcache"}
        self.requests = Counter("requests", "requests by outcome", ["outcome"], **own)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.steps = Counter("steps", "denoising steps of cached pictures", **own)
        self.blocks = Counter("blocks", "blocks of cached pictures", ["decision"], **own)
        for decision in ("computed", "skipped"):
            self.blocks.labels(decision)
        self.generation = Histogram(
            "generation_seconds", "denoising loop, slowest rank", buckets=_SECONDS, **own
        )
        self.wait = Histogram("wait_seconds", "time in the queue", buckets=_SECONDS, **own)
        self.memory = Gauge("memory_bytes", "of a rank after its last picture", ["rank"], **own)
        Gauge("waiting_requests", "requests in the queue", **own).set_function(waiting)
        Gauge("running_requests", "requests being drawn", **own).set_function(running)

    def count(self, outcome: str) -> None:
        """Count a request that ended; `outcome` is one of `OUTCOMES`."""
        self.requests.labels(outcome).inc()

    def drawn(
        self, waited_s: float, seconds: float, statistics: dict[str, Any], memory: dict[int, Any]
    ) -> None:
        """Count a picture.

        Args:
            waited_s: in the queue, in seconds.
            seconds: of the denoising loop on the slowest rank.
            statistics: of the cache; empty for an uncached picture.
            memory: bytes of each rank, None where unknown.
        """
        self.count("done")
        self.wait.observe(waited_s)
        self.generation.observe(seconds)
        self.steps.inc(statistics.get("steps", 0))
        for row in statistics.get("blocks", {}).values():
            for decision in ("computed", "skipped"):
                self.blocks.labels(decision).inc(row[decision])
        for rank, size in memory.items():
            if size is not None:
                self.memory.labels(str(rank)).set(size)
        self.last = statistics

    def exposition(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def statistics(self) -> dict[str, Any]:
        """Return sums over all pictures, the memory by rank, and the last picture's statistics."""
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name.startswith("fastcache_") and "le" not in sample.labels
        }
        of = {
            decision: int(found["fastcache_blocks_total", decision])
            for decision in ("computed", "skipped")
        }
        blocks = sum(of.values())
        pictures = found["fastcache_generation_seconds_count",]
        return {
            "uptime_s": time.time() - self.started,
            "requests": {name: int(found["fastcache_requests_total", name]) for name in OUTCOMES},
            "waiting": int(found["fastcache_waiting_requests",]),
            "running": int(found["fastcache_running_requests",]),
            "steps": int(found["fastcache_steps_total",]),
            "blocks": of,
            "block_approx_ratio": of["skipped"] / blocks if blocks else 0.0,
            "mean_generation_s": (
                found["fastcache_generation_seconds_sum",] / pictures if pictures else None
            ),
            "memory_bytes": {
                key[1]: int(value)
                for key, value in found.items()
                if key[0] == "fastcache_memory_bytes"
            },
            "last": self.last,
        }

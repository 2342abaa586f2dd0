"""A simulated world of ranks that agree once a step: what share of a step that takes.

All times are in microseconds. `LINKS` are what is assumed of the wires, `docs/scale.md` says where
each comes from. A message takes a lognormal time with a published median and 99th percentile, each
drawn on its own. A rank arrives at a round up to an exponential jitter late, and a straggler later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]
# Quantile of the standard normal at 99 %.
_Z99 = 2.3263478740408408


@dataclass(frozen=True)
class Link:
    """How long one message takes.

    Attributes:
        median: of all messages.
        p99: that one of a hundred exceeds.
    """

    median: float
    p99: float

    @property
    def mean(self) -> float:
        """Mean of the lognormal through both: the median times `exp(s^2 / 2)`."""
        return self.median * math.exp((math.log(self.p99 / self.median) / _Z99) ** 2 / 2)

    def draw(self, normal: Times) -> Times:
        """Return times from standard normal numbers."""
        return self.median * np.exp(math.log(self.p99 / self.median) / _Z99 * normal)


@dataclass(frozen=True)
class World:
    """Ranks in nodes, nodes in pods, and how they are late.

    Attributes:
        ranks: all of them, filled in order.
        in_node, in_pod, across: links between ranks of a node, of a pod, of two pods.
        node: ranks a node.
        pod: ranks a pod.
        jitter: mean of the exponential time by which a rank arrives late at a round.
        straggles: chance that a rank is a straggler in a round.
        late: by how much that one arrives later.
        handled: what a message costs the host of the rank that sends it, and as much that of the
            one that takes it; the ring's messages are spared it.
    """

    ranks: int
    in_node: Link
    in_pod: Link
    across: Link
    node: int = 8
    pod: int = 64
    jitter: float = 50.0
    straggles: float = 1e-3
    late: float = 1000.0
    handled: float = 10.0

    def arrivals(self, rounds: int, random: np.random.Generator) -> Times:
        """Return when each rank comes to each round, `(rounds, ranks)`."""
        shape = (rounds, self.ranks)
        late = self.late * (random.random(shape) < self.straggles)
        return random.exponential(self.jitter, shape) + late if self.jitter else late

    def message(self, source: NDArray[np.int64], rounds: int, random: np.random.Generator) -> Times:
        """Return the time of a message from each rank's source to the rank."""
        own = np.arange(self.ranks)
        normal = random.standard_normal((rounds, self.ranks))
        times = self.across.draw(normal)
        for size, link in ((self.pod, self.in_pod), (self.node, self.in_node)):
            near = own // size == source // size
            times[:, near] = link.draw(normal[:, near])
        return times


def last_arrival(jitter: float, ranks: int) -> float:
    """Return the mean of the largest of so many exponential times: harmonic number times jitter.

    Example:
        >>> last_arrival(50.0, 2)
        75.0
    """
    return jitter * sum(1.0 / k for k in range(1, ranks + 1))


# ---- protocols: from arrivals to the time at which each rank knows the sum ----------------------


def ring(world: World, start: Times, random: np.random.Generator) -> Times:
    """gloo's all-reduce: to the neighbour, `2 (n - 1)` times."""
    source = np.roll(np.arange(world.ranks), 1)
    known = start
    for _ in range(2 * (world.ranks - 1)):
        took = world.message(source, len(start), random)
        known = np.maximum(known, known[:, source] + took)
    return known


def tree(world: World, start: Times, random: np.random.Generator) -> Times:
    """Sums of pairs, then of pairs of pairs, within a node first; for powers of two."""
    assert world.ranks & (world.ranks - 1) == 0
    known, own = start, np.arange(world.ranks)
    for level in range(world.ranks.bit_length() - 1):
        source = own ^ (1 << level)
        took = world.message(source, len(start), random) + 2 * world.handled
        known = np.maximum(known, known[:, source] + took)
    return known


def direct(world: World, start: Times, random: np.random.Generator) -> Times:
    """The library's: from each rank to each."""
    return _all_to_all(world, start, random, np.arange(world.ranks)[None])


def hierarchical(world: World, start: Times, random: np.random.Generator) -> Times:
    """From each to each within a node, then between those of the same place in all nodes."""
    places = np.arange(world.ranks).reshape(-1, min(world.node, world.ranks))
    known = _all_to_all(world, start, random, places)
    return _all_to_all(world, known, random, places.T)


def _all_to_all(
    world: World, start: Times, random: np.random.Generator, groups: NDArray[np.int64]
) -> Times:
    """Send from each rank to each of its group, a row of `groups`, one message after the other."""
    size = groups.shape[1]
    handling = (size - 1) * world.handled
    known = start + handling
    for distance in range(1, size):
        source = np.empty(world.ranks, dtype=np.int64)
        source[groups] = np.roll(groups, distance, axis=1)
        sent = start[:, source] + distance * world.handled
        known = np.maximum(known, sent + world.message(source, len(start), random))
    return known + handling


PROTOCOLS = {"ring": ring, "tree": tree, "direct": direct, "hierarchical": hierarchical}
# How a vector that is awaited a step later may travel meanwhile.
CARRIED = ("ring", "direct", "hierarchical")


def waits(world: World, rounds: int, seed: int, step: float) -> dict[str, float]:
    """Return the mean time that a rank waits in a round, by protocol.

    Args:
        world: that agrees.
        rounds: simulated.
        seed: of all draws; the same arrivals for every protocol.
        step: time from one round to the next; a lagged vector is awaited then.
    """
    start = world.arrivals(rounds, np.random.default_rng(seed))
    found = {}
    for name, protocol in PROTOCOLS.items():
        known = protocol(world, start, np.random.default_rng(seed + 1))
        found[name] = float((known - start).mean())
        if name in CARRIED:
            # Who was late then need not be late now: arrivals are drawn anew.
            following = world.arrivals(rounds, np.random.default_rng(seed + 2)) + step
            found[f"lagged, {name}"] = float(np.maximum(known - following, 0.0).mean())
    found["last arrival"] = float((start.max(axis=1, keepdims=True) - start).mean())
    return found


# ---- a step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """How long a step takes on so many ranks: `fixed + shared / n`, and how long a skipped one.

    Attributes:
        fixed: that no rank takes off another.
        shared: that they share.
        skipped: of a step that no block runs in, on any number of ranks.
    """

    fixed: float
    shared: float
    skipped: float

    @classmethod
    def through(cls, one: float, many: float, ranks: int, skipped: float) -> Steps:
        """Return the line through a step's time on one rank and on `ranks` of them."""
        shared = (one - many) / (1.0 - 1.0 / ranks)
        return cls(one - shared, shared, skipped)

    def computed(self, ranks: int) -> float:
        """Return the time of a computed step."""
        return self.fixed + self.shared / ranks

    def gain(self, ranks: int, skip: float, agreeing: float = 0.0) -> float:
        """Return the speedup where a share of the steps is skipped and each waits to agree."""
        cached = (1.0 - skip) * self.computed(ranks) + skip * self.skipped + agreeing
        return self.computed(ranks) / cached

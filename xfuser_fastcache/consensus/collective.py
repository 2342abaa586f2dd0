"""One vector a step, summed over all ranks: the gate's input becomes the same bits on each of them.

The vector is a header and the groups of moments. Each header field rides as value and square;
the sums equal world size times one's own exactly when all ranks agree (zero variance), so every
rank sees a disagreement at that very collective and raises, rather than drifting apart.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from xfuser_fastcache.consensus.header import HEADER, Header
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.consensus.transfer import HostCopy, Resident

PROTOCOL = 2
_MAX_BLOCK_LISTS = 4


# How long ranks whose waits end in vain give each other to say so.
_GRACE_S = 3.0
# What gloo and NCCL say when a peer is late or gone; they raise plain RuntimeErrors.
_COMMUNICATION = re.compile(r"timed? ?out|connection|closed by peer|watchdog", re.IGNORECASE)


class ConsensusError(RuntimeError):
    """The ranks of a decision group do not agree on what they are doing."""


class ConsensusTimeout(ConsensusError):
    """A rank did not arrive; the message names it."""


class Usage(NamedTuple):
    """What the wire has been used for so far: vectors posted, and seconds spent waiting."""

    collectives: int
    wait_s: float


@dataclass(frozen=True)
class BlockList:
    """What one rank holds of one list of blocks.

    Attributes:
        blocks: how many.
        cost: parameters of one of them; 0 where there is none.
    """

    blocks: int
    cost: int


@dataclass
class Ticket:
    """A posted vector that may still be on its way.

    Attributes:
        header: which decision it belongs to.
        moments: this rank's, int64 `(groups, slots)`.
        sequence: counts posted vectors.
        rows: int64 `(rows, numbers)`, headers and moments that add up to those of all ranks; None
            before they are on their way, unknown until they have arrived.
        work: the collective that brings them.
    """

    header: Header
    moments: HostCopy
    sequence: int
    rows: torch.Tensor | None = None
    work: Any = None


@dataclass
class GatherTicket:
    """A posted gather that may still be on its way."""

    rows: list[torch.Tensor]
    work: Any
    what: str


class Consensus:
    """Reduces vectors over a decision group; owns the only collectives of the cache.

    A group of one rank agrees with itself: a round then needs no wire.

    Args:
        group: who decides together.
        backend: `"gloo"` reduces on the host, over a group of its own; `"nccl"` on the device, over
            the group's device group.
        timeout_s: longest wait for the other ranks, in seconds.
        config_digest: 48 bits that must be equal on all ranks.
        block_lists: what this rank holds of each list of the model's blocks.

    Attributes:
        stages: the block lists of every pipeline stage, in order.
        collectives: vectors posted so far.
        wait_s: seconds spent waiting for them.
        broken: whether a wait has failed; then no collective of this group can succeed.

    Raises:
        ValueError: NCCL without a CUDA device.
        ConsensusError: the ranks run different options, models or protocols.
        ConsensusTimeout: a rank did not arrive.
    """

    def __init__(
        self,
        group: DecisionGroup,
        *,
        backend: str,
        timeout_s: float,
        config_digest: int,
        block_lists: tuple[BlockList, ...],
    ):
        if backend == "nccl" and not torch.cuda.is_available():
            raise ValueError(
                "sync_backend='nccl' needs a CUDA device and there is none; use sync_backend='gloo'"
            )
        self.group = group
        self.timeout_s = timeout_s
        self.collectives = 0
        self.wait_s = 0.0
        self._sequence = 0
        self._distributed = group.world_size > 1
        self._device = torch.device("cpu")
        self._process_group: Any = None
        self._pool: list[Any] | None = None
        self._outgoing: list[Ticket] = []
        self.broken = False
        if self._distributed:
            self._store = dist.PrefixStore(
                f"xfuser_fastcache/{_next_instance(group.ranks)}/{min(group.ranks)}",
                dist.distributed_c10d._get_default_store(),
            )
            self._join(backend)
        self.stages = self._hello(config_digest, block_lists)

    def _join(self, backend: str) -> None:
        if backend == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())
            self._process_group = self.group.device_group
            return
        what = "the first meeting of the decision group"
        self._arrive(what)
        self._pool = _idle_groups.setdefault((self.group.ranks, self.timeout_s), [])
        if self._pool:
            self._process_group = self._pool.pop()
            return
        try:
            # Not `dist.new_group`: that names a group by how many this process has, which differs
            # between ranks where xDiT's parallel VAE has made some, and then they never meet.
            self._process_group = dist.ProcessGroupGloo(
                dist.PrefixStore("group", self._store),
                self.group.ranks.index(self.group.rank),
                self.group.world_size,
                timedelta(seconds=self.timeout_s),
            )
        except RuntimeError as error:
            raise self._missing(what, error) from error

    def _hello(self, config_digest: int, own: tuple[BlockList, ...]) -> list[list[BlockList]]:
        """Compare, once and at fixed size, what must be equal; return the stages' block lists."""
        assert len(own) <= _MAX_BLOCK_LISTS
        unused = (-1, 0) * (_MAX_BLOCK_LISTS - len(own))
        lists = [number for held in own for number in (held.blocks, held.cost)]
        row = (PROTOCOL, config_digest, self.group.stages, self.group.stage, *lists, *unused)
        table = self.gather(torch.tensor(row, dtype=torch.int64), "the comparison of options")
        mine = table[self.group.rank]
        for index, name in enumerate(("version of the protocol", "cache config", "stage count")):
            others = sorted(rank for rank, row in table.items() if row[index] != mine[index])
            if others:
                raise ConsensusError(
                    f"ranks {others} have another {name} than rank {self.group.rank}: all ranks "
                    f"of a decision group {list(self.group.ranks)} must apply the same cache "
                    "options to the same model. Build the config before ranks part ways."
                )
        stages: dict[int, list[BlockList]] = {}
        for rank, other in sorted(table.items()):
            held = [BlockList(*other[i : i + 2]) for i in range(4, len(other), 2) if other[i] >= 0]
            if stages.setdefault(other[3], held) != held:
                raise ConsensusError(
                    f"rank {rank} holds {held} in pipeline stage {other[3]}, another rank of that "
                    f"stage {stages[other[3]]}: the ranks run different models"
                )
        return [stages[stage] for stage in sorted(stages)]

    @property
    def usage(self) -> Usage:
        """What it has been used for so far."""
        return Usage(self.collectives, self.wait_s)

    def post(self, header: Header, moments: torch.Tensor) -> Ticket:
        """Send this rank's moments on their way; every rank does, at every step, always.

        Args:
            header: which decision this is.
            moments: int64 `(groups, slots)` on any device.
        """
        self.collectives += 1
        # NCCL reduces where the moments are, so that only the sums come to the host.
        copy = HostCopy(moments) if self._device.type == "cpu" else Resident(moments)
        ticket = Ticket(header, copy, self.collectives)
        if self._distributed:
            self._outgoing.append(ticket)
            self._send(until=None)
        return ticket

    def _send(self, until: Ticket | None) -> None:
        """Put outgoing vectors into their collectives, in the order in which they were posted.

        That order is the same on all ranks; when each one leaves need not be. So those that have
        not arrived on the host yet are left for later, up to the one that is awaited.
        """
        while self._outgoing and (until is not None or self._outgoing[0].moments.arrived):
            ticket = self._outgoing.pop(0)
            ticket.rows, ticket.work = self._spread(self._vector(ticket), str(ticket.header))
            if ticket is until:
                break

    def _vector(self, ticket: Ticket) -> torch.Tensor:
        start = torch.tensor(ticket.header.numbers(), dtype=torch.int64, device=self._device)
        return torch.cat((start, ticket.moments.wait().reshape(-1)))

    def _spread(self, vector: torch.Tensor, what: str) -> tuple[torch.Tensor, Any]:
        """The collective; nothing else in the cache communicates during a generation.

        Over gloo each rank sends its vector to each other one, all at the same time, and adds up
        what it is sent: a message a wait, where gloo's all-reduce has `2 (n - 1)` in a row.
        """
        self._arrive(what)
        try:
            if self._device.type != "cpu":
                return vector[None], self._process_group.allreduce([vector])
            copies = vector.repeat(self.group.world_size, 1)
            rows = torch.empty_like(copies)
            options = dist.AllToAllOptions()
            return rows, self._process_group.alltoall_base(rows, copies, [], [], options)
        except RuntimeError as error:
            raise self._missing(what, error) from error

    def wait(self, ticket: Ticket) -> list[list[int]]:
        """Return the reduced moments of a posted vector, one list of integers a group.

        Raises:
            ConsensusError: the header shows that ranks are at different places.
            ConsensusTimeout: a rank did not arrive within `timeout_s`.
        """
        if not self._distributed:
            return ticket.moments.wait().tolist()
        started = time.perf_counter()
        if ticket.rows is None:
            self._send(until=ticket)
        self._finish(ticket.work, str(ticket.header))
        assert ticket.rows is not None
        numbers = ticket.rows.sum(dim=0).tolist()
        self.wait_s += time.perf_counter() - started
        self._check(ticket.header, numbers[:HEADER])
        body = torch.tensor(numbers[HEADER:], dtype=torch.int64)
        return body.view(ticket.moments.wait().shape).tolist()

    def _check(self, header: Header, sums: list[int]) -> None:
        world = self.group.world_size
        wrong = [
            f"{name} (own {value}, mean of all {sums[2 * i] / world:g})"
            for i, (name, value) in enumerate(header.fields().items())
            if (sums[2 * i], sums[2 * i + 1]) != (world * value, world * value * value)
        ]
        if wrong:
            raise ConsensusError(
                f"the {world} ranks of the decision group {list(self.group.ranks)} are at "
                f"different places; they differ in {', '.join(wrong)}. Every rank of the group "
                "must run the same calls in the same order; rank "
                f"{self.group.rank} stands at {header}."
            )

    def gather(self, row: torch.Tensor, what: str) -> dict[int, list[int]]:
        """Return every rank's int64 row of a fixed length, by rank."""
        return self.wait_gather(self.post_gather(row, what))

    def post_gather(self, row: torch.Tensor, what: str) -> GatherTicket:
        """Send a row of a fixed length on its way to all ranks; every rank does."""
        row = row.to(self._device)
        if not self._distributed:
            return GatherTicket([row], None, what)
        if self._outgoing:  # they were posted before, and ranks differ in which of them have left
            self._send(until=self._outgoing[-1])
        rows = [torch.empty_like(row) for _ in self.group.ranks]
        self._arrive(what)
        work = self._process_group.allgather([rows], [row])
        return GatherTicket(rows, work, what)

    def wait_gather(self, ticket: GatherTicket) -> dict[int, list[int]]:
        """Return the rows of a posted gather, by rank."""
        if ticket.work is not None:
            self._finish(ticket.work, ticket.what)
        return {rank: row.tolist() for rank, row in zip(self.group.ranks, ticket.rows, strict=True)}

    def _finish(self, work: Any, what: str) -> None:
        try:
            work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise self._missing(what, error) from error

    def _arrive(self, what: str) -> None:
        """Leave word of where this rank is, for those who might wait for it in vain."""
        self._sequence += 1
        self._store.set(str(self.group.rank), f"{self._sequence}|{what}")

    def absent(self) -> dict[int, str]:
        """Return the ranks that are behind this one, with the last place they were seen at."""
        if not self._distributed:
            return {}
        behind = {}
        for rank in self.group.ranks:
            key = str(rank)
            if not self._store.check([key]):
                behind[rank] = "never seen"
                continue
            sequence, what = self._store.get(key).decode().split("|", 1)
            if int(sequence) < self._sequence:
                behind[rank] = f"last seen at {what}"
        return behind

    def explain(self, error: RuntimeError, where: str) -> None:
        """Raise with the names of absent ranks if `error` is a communication that failed.

        Collectives and sends of the model itself, not of this class, fail like this.

        Raises:
            ConsensusTimeout: from `error`; other errors return.
        """
        if self._distributed and _COMMUNICATION.search(str(error)):
            # Ranks that wait like this one say so, and have a moment for it; the rest are missing.
            self._arrive(f"{where}, waiting in vain")
            time.sleep(min(_GRACE_S, self.timeout_s))
            raise self._missing(where, error) from error

    def _missing(self, what: str, error: Exception) -> ConsensusTimeout:
        self.broken = True
        absent = self.absent()
        who = "; ".join(f"rank {rank} ({where})" for rank, where in absent.items())
        return ConsensusTimeout(
            f"rank {self.group.rank} waited at {what} for the decision group "
            f"{list(self.group.ranks)}, at most sync_timeout_s={self.timeout_s:g} s. "
            f"Did not arrive: {who or 'nobody; a connection broke'}. Cause: {error}"
        )

    def close(self) -> None:
        """Hand the process group on to the next consensus of the same ranks."""
        if self._pool is not None and not self.broken:
            self._pool.append(self._process_group)
        self._pool = None
        self._distributed = False


# Groups whose consensus is closed. They are used again and never destroyed: a rank may close while
# another still reads what it was sent.
_idle_groups: dict[tuple[tuple[int, ...], float], list[Any]] = {}
_instances: dict[tuple[int, ...], int] = {}


def _next_instance(ranks: tuple[int, ...]) -> str:
    """Return a name for the next consensus of these ranks; equal on all of them."""
    _instances[ranks] = _instances.get(ranks, 0) + 1
    return f"{'-'.join(map(str, ranks))}/{_instances[ranks]}"

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

from xfuser_fastcache.consensus.board import Board
from xfuser_fastcache.consensus.errors import ConsensusError, ConsensusTimeout
from xfuser_fastcache.consensus.header import HEADER, Header
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.consensus.transfer import GatherTicket, HostCopy, Resident, Ticket

PROTOCOL = 2
# How long a wait goes on before it looks whether another rank has failed, and again.
_LOOK_S = 0.5
# How long ranks that disagree wait for each other's words on where they are.
_TELL_S = 3.0
# What gloo and NCCL say when a peer is late or gone; they raise plain RuntimeErrors.
_COMMUNICATION = re.compile(r"timed? ?out|connection|closed by peer|watchdog", re.IGNORECASE)


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
        renewed: name of the meeting where all ranks agreed to make their channels anew, since one
            of them had failed; "" where none had.

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
        if backend == "nccl" and group.world_size > 1 and group.device_group is None:
            raise ValueError(
                "sync_backend='nccl' needs a process group of the ranks that decide together, "
                f"{list(group.ranks)}, and this layout has none; use sync_backend='gloo'"
            )
        self.group = group
        self.timeout_s = timeout_s
        self.collectives = 0
        self.wait_s = 0.0
        self.renewed = ""
        self._distributed = group.world_size > 1
        self._device = torch.device("cpu")
        self._wire: Any = None
        self._own: _Named | None = None
        self._outgoing: list[Ticket] = []
        row = [PROTOCOL, config_digest, group.stages, group.stage]
        row += [number for held in block_lists for number in (held.blocks, held.cost)]
        if not self._distributed:
            self.stages = self._compared({group.rank: row})
            return
        self.board = Board(group.ranks, group.rank, timeout_s)
        self._idle = _idle_groups.setdefault((group.ranks, timeout_s), [])
        own = {"row": row, "idle": self._idle[-1].name if self._idle else "", "failed": self.failed}
        met = self.board.meet(own, "the first meeting of the decision group")
        rows = {rank: brought["row"] for rank, brought in met.items()}
        self.stages = self._compared(rows)
        self._of_stage = tuple(rank for rank, row in rows.items() if row[3] == group.stage)
        if any(brought["failed"] for brought in met.values()):
            self.renewed = self.board.name
            _failed.discard(group.ranks)
            self._idle.clear()
        self._join(backend, {brought["idle"] for brought in met.values()})

    def _join(self, backend: str, idle: set[str]) -> None:
        if backend == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())
            self._wire = self.group.device_group
            return
        if self._idle and idle == {self._idle[-1].name}:
            self._own = self._idle.pop()
            self._wire = self._own.wire
            return
        try:
            # Not `dist.new_group`: that names a group by how many this process has, which differs
            # between ranks where xDiT's parallel VAE has made some, and then they never meet.
            self._wire = dist.ProcessGroupGloo(
                self.board.store("group"),
                self.group.ranks.index(self.group.rank),
                self.group.world_size,
                timedelta(seconds=self.timeout_s),
            )
        except RuntimeError as error:
            raise self._missing("the first connection of the decision group", error) from error
        self._own = _Named(self.board.name, self._wire)

    def _compared(self, table: dict[int, list[int]]) -> list[list[BlockList]]:
        """Compare, once, what must be equal on all ranks; return the stages' block lists."""
        mine = table[self.group.rank]
        for index, name in enumerate(("version of the protocol", "cache config", "stage count")):
            others = sorted(rank for rank, row in table.items() if row[index] != mine[index])
            if others:
                raise ConsensusError(
                    f"ranks {others} have another {name} than rank {self.group.rank}: all ranks "
                    f"of a decision group {list(self.group.ranks)} must apply the same cache "
                    "options to the same model. Build the config before ranks part ways. Replicas "
                    "that draw pictures of their own need a group each: give process_group."
                )
        stages: dict[int, list[BlockList]] = {}
        for rank, other in sorted(table.items()):
            held = [BlockList(*other[i : i + 2]) for i in range(4, len(other), 2)]
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
            payload = ticket.moments.wait().reshape(-1)
            start = torch.tensor(ticket.header.numbers, dtype=torch.int64, device=self._device)
            vector = torch.cat((start, payload))
            ticket.rows, ticket.work = self._spread(vector, str(ticket.header))
            if ticket is until:
                break

    def _spread(self, vector: torch.Tensor, what: str) -> tuple[torch.Tensor, Any]:
        """The collective; nothing else in the cache communicates during a generation.

        Over gloo each rank sends its vector to each other one, all at the same time, and adds up
        what it is sent: a message a wait, where gloo's all-reduce has `2 (n - 1)` in a row.
        """
        self.board.arrive(what)
        try:
            if self._device.type != "cpu":
                return vector[None], self._wire.allreduce([vector])
            copies = vector.repeat(self.group.world_size, 1)
            rows = torch.empty_like(copies)
            options = dist.AllToAllOptions()
            return rows, self._wire.alltoall_base(rows, copies, [], [], options)
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
        self._check(ticket, numbers[:HEADER])
        body = torch.tensor(numbers[HEADER:], dtype=torch.int64)
        return body.view(ticket.moments.wait().shape).tolist()

    def _check(self, ticket: Ticket, sums: list[int]) -> None:
        """Raise where ranks disagree; all see it at the same vector, and tell each other more."""
        header, world = ticket.header, self.group.world_size
        wrong = header.differing(sums, world)
        if not wrong:
            return
        key = f"disagreement/{ticket.sequence}"
        self.board.leave(key, ", ".join(filter(None, (str(header), header.setup))))
        said = self.board.take(key, grace_s=_TELL_S)
        told: dict[str, list[int]] = {}
        for rank in self.group.ranks:
            # A stage may wait for its neighbour's message, and take the same vector later.
            place = said.get(rank, "a place that they have not told yet")
            told.setdefault(place, []).append(rank)
        places = "; ".join(f"ranks {ranks} at {place}" for place, ranks in told.items())
        raise ConsensusError(
            f"the {world} ranks of the decision group {list(self.group.ranks)} are at different "
            f"places; they differ in {', '.join(wrong)}: {places}. Every rank of the group must "
            f"run the same calls in the same order; rank {self.group.rank} stands at {header}. "
            "Replicas that draw pictures of their own need a group each: give process_group."
        )

    def gather(self, row: list[int], what: str) -> dict[int, list[int]]:
        """Return every rank's row of integers, by rank."""
        return self.wait_gather(self.post_gather(row, what))

    def post_gather(self, row: list[int], what: str) -> GatherTicket:
        """Leave a row for all ranks; every rank does."""
        return GatherTicket(row, self.board.post(row, what) if self._distributed else None)

    def wait_gather(self, ticket: GatherTicket) -> dict[int, list[int]]:
        """Return the rows of a posted gather, by rank.

        Raises:
            ConsensusTimeout: a rank did not post its own.
            ConsensusError: a rank has failed.
        """
        if ticket.key is None:
            return {self.group.rank: ticket.row}
        return self.board.take(ticket.key)

    def compare(self, value: str, what: str, within_stage: bool = False) -> None:
        """Compare, at once, what must be equal on all ranks that draw one picture together.

        Args:
            value: in a few words or as a digest.
            what: the ranks are said to differ in.
            within_stage: whether only ranks of this one's stage are waited for.

        Raises:
            ConsensusError: it names the ranks that differ from this one.
        """
        if not self._distributed:
            return
        key = self.board.post(value, f"the comparison of {what}")
        ranks = self._of_stage if within_stage else self.group.ranks
        found = self.board.take(key, ranks=tuple(r for r in ranks if r in self.group.together))
        others = sorted(rank for rank, other in found.items() if other != value)
        if others:
            raise ConsensusError(
                f"ranks {others} were given other {what} than rank {self.group.rank}, in one "
                f"decision group {list(self.group.ranks)}, whose ranks draw one picture together: "
                f"{'; '.join(f'rank {rank} {other}' for rank, other in sorted(found.items()))}. "
                "Give all of them the same; replicas that draw pictures of their own need a group "
                "each: give process_group."
            )

    def _finish(self, work: Any, what: str) -> None:
        """Wait for a collective, no longer than the limit nor than it takes to hear of a failure.

        Raises:
            ConsensusTimeout: a rank did not arrive.
            ConsensusError: a rank has left word that it has failed.
        """
        deadline = time.monotonic() + self.timeout_s
        # A wait of NCCL that ends by its limit aborts the communicator, so it has one alone.
        slice_s = self.timeout_s if self._device.type == "cuda" else _LOOK_S
        while True:
            left = deadline - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(min(left, slice_s), 1e-3)))
                return
            except RuntimeError as error:
                if left <= slice_s or work.is_completed():
                    self.board.check(what)
                    raise self._missing(what, error) from error
            self.board.check(what)

    def absent(self) -> dict[int, str]:
        """Return the ranks that are behind this one, with the last place they were seen at."""
        return self.board.absent() if self._distributed else {}

    @property
    def failed(self) -> bool:
        """Whether a generation has failed on this rank since the ranks last met to apply a cache.

        Then ranks may be at different places in the model's own communication.
        """
        return self.group.ranks in _failed

    def fail(self, error: BaseException, where: str) -> None:
        """Take in that a generation has failed on this rank, and let the others know.

        Raises:
            ConsensusTimeout: from `error`, with the names of absent ranks, if it is a communication
                that failed: collectives and sends of the model itself fail like this.
        """
        if not self._distributed:
            return
        _failed.add(self.group.ranks)
        unnamed = isinstance(error, RuntimeError) and not isinstance(error, ConsensusError)
        if unnamed and _COMMUNICATION.search(str(error)):
            # Ranks that wait like this one say so, and have a moment for it; the rest are missing.
            absent = self.board.let_others_say(where)
            found = self.board.missing(where, absent, error)
            self.board.fail(f"{where}: {found}")
            raise found from error
        self.board.fail(f"{where}: {type(error).__name__}: {error}")

    def _missing(self, what: str, error: BaseException) -> ConsensusTimeout:
        _failed.add(self.group.ranks)
        return self.board.missing(what, cause=error)

    def close(self) -> None:
        """Hand the process group on to the next consensus of the same ranks."""
        if self._own is not None and not self.failed:
            self._idle.append(self._own)
        # What still holds this object, such as an error's traceback, holds no sockets and threads.
        self._own = self._wire = None
        self._distributed = False


class _Named(NamedTuple):
    """A process group of ours; its name is equal on all ranks."""

    name: str
    wire: Any


# Groups whose consensus is closed. They are used again and never destroyed: a rank may close while
# another still reads what it was sent.
_idle_groups: dict[tuple[tuple[int, ...], float], list[_Named]] = {}
# Decision groups of which a generation has failed here since they last met.
_failed: set[tuple[int, ...]] = set()


def note_failure(ranks: tuple[int, ...]) -> None:
    """Take in that a generation without a cache has failed on this rank, in one decision group."""
    _failed.add(ranks)

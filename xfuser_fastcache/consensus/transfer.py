"""What is on its way: to where it is reduced, without anybody waiting for the device, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from xfuser_fastcache.consensus.header import Header


class HostCopy:
    """A tensor on its way to the host; nobody waits for it until it is needed.

    Args:
        tensor: on any device; what is written into it afterwards is not copied.
    """

    def __init__(self, tensor: torch.Tensor):
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()

    @property
    def arrived(self) -> bool:
        """Whether nobody would have to wait."""
        return self._event is None or self._event.query()

    def wait(self) -> torch.Tensor:
        """Return the copy once the device has come that far; what it does later is not awaited."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Resident(HostCopy):
    """A tensor that stays on its device."""

    def __init__(self, tensor: torch.Tensor):
        self._event = None
        self._host = tensor.clone()


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
    """A posted row, and the key to take all ranks' rows by; None where there is but one rank."""

    row: list[int]
    key: str | None

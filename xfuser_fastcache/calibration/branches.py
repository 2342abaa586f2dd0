"""Which step and branch of guidance a call of a denoiser belongs to, for recorders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from xfuser_fastcache.apply import model_of
from xfuser_fastcache.clock.clock import Reader
from xfuser_fastcache.clock.pipelines import PresentScheduler, watch_pipelines
from xfuser_fastcache.clock.timeline import Timeline
from xfuser_fastcache.consensus.topology import PlainLayout
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.forward_layout import ForwardContract
from xfuser_fastcache.models.token_layout import TokenCounts


def contract_of(denoiser: nn.Module, adapter: type[ModelAdapter], stages: int) -> ForwardContract:
    """Return how a denoiser's forward pass is read: the noise, without a condition's channels.

    Args:
        denoiser: whose forward the pipeline calls.
        adapter: of its family.
        stages: of PipeFusion, of which all but the first are given hidden states.
    """
    if stages > 1:
        return ForwardContract()
    return ForwardContract(adapter.forward_layout(), adapter.noise_channels(model_of(denoiser)))


class Spot(NamedTuple):
    """Where a call is.

    Attributes:
        step: of the generation.
        branch: of guidance. Where a denoiser takes over from another one its branches go on; those
            that are all called at each step have branches of their own.
        takes_over: whether the denoiser enters a generation that another one has begun.
    """

    step: int
    branch: int
    takes_over: bool


class BranchCounter:
    """Tells steps and branches as a cache does, by the clock.

    Args:
        denoisers: of one pipeline, whose forward it calls.
        adapter: of their family.
    """

    def __init__(self, denoisers: Sequence[nn.Module], adapter: type[ModelAdapter]):
        watch_pipelines()
        self._readers = {
            denoiser: Reader(
                adapter,
                TokenCounts(),
                PresentScheduler(denoiser),
                PlainLayout(),
                denoiser=number,
            )
            for number, denoiser in enumerate(denoisers)
        }
        self.reset()

    def reset(self) -> None:
        """Begin a generation."""
        self._timeline = Timeline()
        self._branches: dict[tuple[int, int], int] = {}

    def of(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spot:
        """Return where a call of a denoiser is, by its arguments; branch 0 opens a step."""
        arrival = self._readers[denoiser].arrival(args, kwargs)
        call = self._timeline.open(arrival)
        of = 0 if call.entered else arrival.denoiser, call.branch
        branch = self._branches.setdefault(of, len(self._branches))
        return Spot(call.step, branch, bool(call.entered) and call.entered == call.step)

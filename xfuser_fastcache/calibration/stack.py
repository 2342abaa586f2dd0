"""Linear maps of the whole stack of blocks, from generations that compute everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from xfuser_fastcache.artifacts.linear_map import SpanMaps, bucket_of
from xfuser_fastcache.artifacts.linear_maps import MAPPED, STREAMS
from xfuser_fastcache.backends import FORECASTERS
from xfuser_fastcache.calibration.branches import BranchCounter
from xfuser_fastcache.calibration.maps import Choice, choose, gap_edges
from xfuser_fastcache.calibration.record import sample
from xfuser_fastcache.calibration.ridge import RidgeSums
from xfuser_fastcache.forecasters.base import LinearMapForecaster
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory


class Passage(NamedTuple):
    """The stack at one step.

    Attributes:
        inputs: what entered it, `(batch, tokens, dim)` a stream.
        residual: what it added, same shapes; without text where the last block drops it.
    """

    inputs: Streams
    residual: Streams


class StackRecorder:
    """Records what enters and leaves the stack of blocks; the outputs stay as they are.

    While it is entered, the generations of an uncached transformer are recorded; call `take` after
    each of them. Calls of one step with the same timestep are branches. Of a generation, the tokens
    of all steps are held on the host in float32: 8 bytes a token, channel and step, of each stream.

    Args:
        transformer: a diffusers transformer.
        adapter: of its family.
        max_tokens: tokens of a stream that are recorded, an even selection where there are more.
    """

    def __init__(self, transformer: nn.Module, adapter: type[ModelAdapter], max_tokens: int):
        self.transformer = transformer
        self.adapter = adapter
        self.max_tokens = max_tokens
        self._branches: list[list[Passage]] = []
        self._counter = BranchCounter((transformer,), adapter)
        self._branch = 0
        self._inputs: Streams | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> StackRecorder:
        lists = list(self.adapter.block_lists)
        first = getattr(self.transformer, lists[0])[0]
        last = getattr(self.transformer, lists[-1])[-1]
        self._handles = [
            self.transformer.register_forward_pre_hook(self._see_call, with_kwargs=True),
            first.register_forward_pre_hook(self._see_input, with_kwargs=True),
            last.register_forward_hook(self._see_output),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self, steps: int) -> list[list[Passage]]:
        """Return the generation that was just recorded, branch by branch, and forget it.

        Args:
            steps: that were planned.

        Raises:
            ValueError: a branch did not run once a step.
        """
        branches, self._branches = self._branches, []
        self._counter.reset()
        lengths = sorted({len(branch) for branch in branches})
        if lengths != [steps]:
            raise ValueError(
                f"a generation of {steps} steps whose branches ran {lengths or 'no'} times cannot "
                "be fitted on: every branch has to run once a step"
            )
        return branches

    def _see_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._branch = self._counter.of(module, args, kwargs).branch
        if self._branch == len(self._branches):
            self._branches.append([])

    def _see_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        contract = self.adapter.first_contract(block)
        self._inputs = contract.read(args, kwargs).map(self._kept)

    def _see_output(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        contract = list(self.adapter.block_lists.values())[-1].of(block)
        assert self._inputs is not None
        residual = contract.unpack(output).map(self._kept).map(torch.sub, self._inputs)
        self._branches[self._branch].append(Passage(self._inputs, residual))

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        return sample(x.detach(), self.max_tokens).float().cpu().clone()


def pairs(
    branch: Sequence[Passage],
    levels: Sequence[float],
    forecaster: LinearMapForecaster,
    max_lag: int,
) -> Iterator[tuple[float, Streams, Streams]]:
    """Yield what goes into a forecaster's map and what it had better return.

    For every step but the last, which is seldom skipped and changes most, and every anchor up to
    `max_lag` steps before it. Where the forecaster looks back on two, the older one lies as far
    before the newer one as that before the step, or farther, up to `max_lag` steps: so do those of
    a cache that computes at even distances, and what is extrapolated at most doubles.

    Args:
        branch: the stack at every step.
        levels: noise level of every step.
        forecaster: whose `pair` is asked.
        max_lag: in steps.

    Yields:
        (gap in noise level to the anchor, input's change, residual's change).
    """
    anchors = [Anchor(level, *at, None) for level, at in zip(levels, branch, strict=True)]
    for step in range(1, len(branch) - 1):
        for newest in range(max(0, step - max_lag), step):
            lag = step - newest
            older = range(max(0, newest - max_lag), newest - lag + 1)
            behind = [(anchors[i],) for i in older] if forecaster.depth == 2 else [()]
            for others in behind:
                memory = Memory((anchors[newest], *others))
                moved = forecaster.pair(memory, *branch[step], levels[step])
                yield abs(levels[step] - levels[newest]), *moved


class Place(NamedTuple):
    """Which map: for a forecaster, a stream and a bucket of gaps in noise level."""

    forecaster: str
    stream: str
    bucket: int


@dataclass
class StackSums:
    """All that the maps of a stack are fitted on and judged by.

    Args:
        levels: noise level of every step.
        max_lag: longest distance from an anchor, in steps.
        buckets: of gaps in noise level.
        dtype: of the sums.
        device: of the sums.

    Memory: a `RidgeSums` a place (forecaster, stream, bucket) for the generations that are fitted
    on, and one more for each that is held out.
    """

    levels: Sequence[float]
    max_lag: int
    buckets: int
    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"
    edges: tuple[float, ...] = field(init=False)
    _fit: dict[Place, RidgeSums] = field(default_factory=dict, init=False)
    _held_out: list[dict[Place, RidgeSums]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.edges = gap_edges(self.levels, self.max_lag, self.buckets)

    def add(self, branches: Sequence[Sequence[Passage]], held_out: bool) -> None:
        """Count a generation in.

        Args:
            branches: of the generation.
            held_out: whether maps are judged by it; else they are fitted on it.
        """
        into: dict[Place, RidgeSums] = {} if held_out else self._fit
        if held_out:
            self._held_out.append(into)
        for name in MAPPED:
            forecaster = FORECASTERS[name]()
            for branch in branches:
                for gap, dx, dr in pairs(branch, self.levels, forecaster, self.max_lag):
                    bucket = bucket_of(self.edges, gap)
                    if bucket is not None:
                        self._count(into, name, bucket, dx, dr)

    def _count(
        self, into: dict[Place, RidgeSums], name: str, bucket: int, dx: Streams, dr: Streams
    ) -> None:
        held = (
            (dx.hidden_states, dr.hidden_states),
            (dx.encoder_hidden_states, dr.encoder_hidden_states),
        )
        for stream, (x, r) in zip(STREAMS, held, strict=True):
            if x is None or r is None:
                continue
            place = Place(name, stream, bucket)
            if place not in into:
                into[place] = RidgeSums(x.shape[-1], self.dtype, self.device)
            into[place].add(x, r)

    def choices(self) -> dict[Place, Choice]:
        """Choose the map of each place that was seen; see `choose`."""
        return {
            place: choose([sums], [held[place] for held in self._held_out if place in held])
            for place, sums in sorted(self._fit.items())
        }

    def maps(self, choices: dict[Place, Choice]) -> dict[str, SpanMaps]:
        """Return the maps that were chosen, by forecaster; none where nothing was seen."""

        def chosen(name: str, stream: str) -> tuple[Any, ...]:
            places = (Place(name, stream, bucket) for bucket in range(len(self.edges)))
            return tuple(
                choices[place].linear_map if place in choices else None for place in places
            )

        return {
            name: SpanMaps(self.edges, chosen(name, "image"), chosen(name, "text"))
            for name in MAPPED
        }

"""TeaCache's polynomial: from relative change of the modulated input to that of the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import nn

from xfuser_fastcache.calibration.branches import BranchCounter
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.forward_layout import ForwardContract


class ChangeRecorder:
    """Records, step by step, how much input and output change; the outputs stay as they are.

    Both changes are L1, relative to the step before, over all tokens. While it is entered, the
    generations of an uncached transformer are recorded; call `take` after each of them. Calls of
    one step with the same timestep are branches, each compared with its own step before.

    Args:
        transformer: a diffusers transformer.
        adapter: of its family.
    """

    def __init__(self, transformer: nn.Module, adapter: type[ModelAdapter]):
        self.transformer = transformer
        self.adapter = adapter
        self._steps: list[list[tuple[float, float]]] = []
        self._contract = ForwardContract()
        self._last: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._modulated: torch.Tensor | None = None
        self._counter = BranchCounter((transformer,), adapter)
        self._handles: list[Any] = []

    def __enter__(self) -> ChangeRecorder:
        first = getattr(self.transformer, next(iter(self.adapter.block_lists)))[0]
        self._handles = [
            first.register_forward_pre_hook(self._see_input, with_kwargs=True),
            self.transformer.register_forward_hook(self._see_output, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[tuple[float, float]]:
        """Return the generation that was just recorded, and forget it.

        Returns:
            (change of what TeaCache's rule measures at the first block, change of the output), one
            a step and branch. The first step has nothing before it; the last one, whose output may
            change more than in all others, is left out, since it is always computed.
        """
        pairs = [pair for step in self._steps[:-1] for pair in step]
        self._steps, self._last = [], {}
        self._counter.reset()
        return pairs

    def _see_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        contract = self.adapter.first_contract(block)
        self._modulated = self.adapter.tea_input(contract, block, args, kwargs)

    def _see_output(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        branch = self._counter.of(module, args, kwargs).branch
        if branch == 0:
            self._steps.append([])
        assert self._modulated is not None
        now = self._modulated.float(), self._contract.unpack(output).hidden_states.float()
        before = self._last.get(branch)
        self._last[branch] = now
        if before is not None:
            changes = [_change(x, y) for x, y in zip(now, before, strict=True)]
            self._steps[-1].append((changes[0], changes[1]))


def _change(now: torch.Tensor, before: torch.Tensor) -> float:
    return float((now - before).abs().sum() / before.abs().sum())


@dataclass(frozen=True)
class Fit:
    """A fitted polynomial.

    Attributes:
        coefficients: highest power first.
        correlation: between what it predicts and the change of the output, -1 to 1.
        of_input: the same for the change of the input itself, which is the identity's.
        domain: least and largest change of the input that it was fitted on, ratios.
    """

    coefficients: list[float]
    correlation: float
    of_input: float
    domain: tuple[float, float]


def fit_polynomial(pairs: list[tuple[float, float]], degree: int = 4) -> Fit:
    """Fit the change of the output to that of the input, by least squares.

    Args:
        pairs: of changes, ratios.
        degree: of the polynomial; TeaCache takes 4.

    Raises:
        ValueError: fewer pairs than coefficients, or changes that are not finite.

    Example:
        >>> fit = fit_polynomial([(x / 10, x * x / 100) for x in range(8)], degree=2)
        >>> [round(c, 6) + 0.0 for c in fit.coefficients]
        [1.0, 0.0, 0.0]

    Source: TeaCache, arXiv 2411.19108, section on the rescaling of input differences.
    """
    found = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    if len(found) <= degree or not np.isfinite(found).all():
        raise ValueError(
            f"a polynomial of degree {degree} needs more than {degree} pairs of finite changes, "
            f"there are {len(found)}; record more steps or generations"
        )
    x, y = found.T
    # Fitted in a variable from -1 to 1, so that powers of small changes do not vanish.
    polynomial = Polynomial.fit(x, y, degree).convert()
    coefficients = np.zeros(degree + 1)
    coefficients[: len(polynomial.coef)] = polynomial.coef
    return Fit(
        coefficients=coefficients[::-1].tolist(),
        correlation=float(np.corrcoef(polynomial(x), y)[0, 1]),
        of_input=float(np.corrcoef(x, y)[0, 1]),
        domain=(float(x.min()), float(x.max())),
    )

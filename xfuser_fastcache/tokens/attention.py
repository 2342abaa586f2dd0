"""Static tokens in attention: the moving ones go on seeing them as they were last computed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from xfuser_fastcache.models.streams import HIDDEN
from xfuser_fastcache.tokens.base import CannotForecast, Narrowing


class StaticTokens:
    """Remembers what each attention module was given of each token when that was last computed.

    Keys and values depend on nothing else, so a module that is given it again attends to the last
    ones. It runs on all tokens, whatever its processor and its layout are; its block's other layers
    run on the few. With FLUX's sizes those are two thirds of a block's parameters and more.
    """

    def __init__(self) -> None:
        self._inputs: dict[Hashable, torch.Tensor] = {}

    def forget(self) -> None:
        """Forget all tokens."""
        self._inputs.clear()

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in self._inputs.values())

    def attend(
        self,
        key: Hashable,
        narrowing: Narrowing | None,
        counts: tuple[int, int],
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an attention module on all image tokens, and return what it puts out for the few.

        Args:
            key: of the module and the branch.
            narrowing: which tokens the block runs on; None for all.
            counts: number of all image tokens, and of rows behind them in the same tensor.
            forward: the module's own; of its result, the first tensor holds the image tokens.
            args, kwargs: its arguments: `hidden_states` `(batch, tokens, dim)`, where text stands
                before the image, first or by name.

        Raises:
            CannotForecast: the module did not run at the last step with all tokens.
        """
        x = args[0] if args else kwargs[HIDDEN]
        tokens, behind = counts
        few = tokens if narrowing is None else narrowing.rows.shape[1]
        text, image, rest = x.split((x.shape[1] - few - behind, few, behind), dim=1)
        if narrowing is None:
            self._inputs[key] = image
            return forward(*args, **kwargs)
        if key not in self._inputs:
            raise CannotForecast("a block runs that the last step with all tokens left out")
        last = self._inputs[key]
        image = self._inputs[key] = narrowing.widen(last, narrowing.narrow(last), image)
        every = torch.cat((text, image, rest), dim=1)
        if args:
            args = (every, *args[1:])
        else:
            kwargs = {**kwargs, HIDDEN: every}
        output = forward(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        text, image, rest = first.split((first.shape[1] - tokens - behind, tokens, behind), dim=1)
        first = torch.cat((text, narrowing.narrow(image), rest), dim=1)
        return (first, *output[1:]) if isinstance(output, tuple) else first

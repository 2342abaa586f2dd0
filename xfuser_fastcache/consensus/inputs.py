"""What the ranks of a decision group are given: a digest of it, and where it is compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from xfuser_fastcache.consensus.collective import Consensus
from xfuser_fastcache.consensus.errors import ConsensusError

_SHAPES = "sizes (of the picture, the batch or the text, or other numbers)"
_INPUTS = "inputs (prompts, embeddings, seeds or sizes)"


class SharedInputs:
    """Compares what ranks are given where a generation begins.

    Args:
        consensus: of the decision group.
        verify: whether values are compared; else sizes alone, where nothing else tells of them.

    Attributes:
        place: of the last call.
    """

    def __init__(self, consensus: Consensus, verify: bool):
        self.consensus = consensus
        self.verify = verify
        self.place = "the beginning"

    def check_pipeline(self, digest: Callable[[bool], str]) -> None:
        """Compare what the pipeline is called with.

        Stages wait for no decision, so that the ranks of one have nothing else to tell them that
        one of them is given another size before they meet in attention.

        Args:
            digest: of what it is given; told whether values are compared, or shapes alone.

        Raises:
            ConsensusError: ranks are given different inputs, or the pipeline's channels may hold
                messages of a generation that has failed.
        """
        self._refuse_failed()
        if self.verify:
            self.consensus.compare(digest(True), _INPUTS)
        elif self.consensus.group.stages > 1:
            self.consensus.compare(digest(False), _SHAPES, within_stage=True)

    def check_call(
        self, place: str, setup: str = "", digest: Callable[[bool, bool], str] | None = None
    ) -> None:
        """Take in where a call of the transformer is, and compare what it is given.

        A transformer that cuts its tokens by itself may attend across ranks before its first block,
        as Z-Image's refiners and VACE's hints do. No vector has told of its sizes by then, and
        others than a peer's end the process inside gloo.

        Args:
            place: in words.
            setup: what it is given, in words.
            digest: of what it is given, where a generation or a branch of it begins; else None.
                Told whether values are compared, or shapes alone, and whether its latents are.

        Raises:
            ConsensusError: see `check_pipeline`.
        """
        if digest is not None:
            self._refuse_failed()
        self.place = place
        group = self.consensus.group
        if digest is None or not group.whole_inputs:
            return
        if group.cuts_tokens:
            self.consensus.compare(f"{setup}, shapes {digest(False, True)}", _SHAPES)
        if self.verify:
            self.consensus.compare(digest(True, group.cuts_tokens), _INPUTS)

    def _refuse_failed(self) -> None:
        if self.consensus.group.stages > 1 and self.consensus.failed:
            raise ConsensusError(
                f"a generation has failed on rank {self.consensus.group.rank} after {self.place}, "
                "and messages of it may be left between the stages. Call remove_cache and "
                "apply the cache again on every rank, which makes new channels."
            )


def digest_of(*given: Any, values: bool = True) -> str:
    """Return a digest of what a call is given: tensors by their bytes, generators by their state.

    What has no value to compare (callbacks, modules) is left out.

    Args:
        *given: arguments.
        values: False takes tensors by their shape and dtype and leaves generators out, so that
            nothing is read from a device.
    """
    found = hashlib.sha256()
    for value in given:
        _digest(value, found, values)
    return found.hexdigest()[:16]


def _digest(value: Any, found: Any, values: bool) -> None:
    if isinstance(value, torch.Generator):
        value = value.get_state() if values else None
    if isinstance(value, torch.Tensor):
        found.update(f"{tuple(value.shape)} {value.dtype}".encode())
        if values:
            # A tensor that was expanded to a batch has no bytes of its own for each item.
            # A copy: one number expanded cannot be seen as bytes, however it is made contiguous.
            held = torch.empty(value.numel(), dtype=value.dtype)
            held.copy_(value.detach().reshape(-1))
            found.update(held.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(key for key, held in value.items() if not callable(held)):
            found.update(repr(key).encode())
            _digest(value[key], found, values)
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}".encode())
        for item in value:
            _digest(item, found, values)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        found.update(repr(value).encode())

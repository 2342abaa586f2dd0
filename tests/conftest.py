"""What holds for all tests: children answer signals, and no test leaves process groups behind."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support.signals import restore_signals

restore_signals()


def pytest_collection_finish() -> None:
    """Leave what is imported out of the garbage collector's rounds: a million objects that stay."""
    gc.collect()
    gc.freeze()


# At the very end, after pytest's own last rounds: nanobind tells at length of what nobody collects.
atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A group that outlives its test would change what later tests find."""
    yield
    assert not dist.is_initialized(), "this test left torch.distributed initialised"


@pytest.fixture
def without_gradients() -> Iterator[None]:
    """As pipelines run: a model that is called alone needs it said."""
    with torch.no_grad():
        yield

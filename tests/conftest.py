"""What holds for all tests: children answer signals, and no test leaves process groups behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from support.signals import restore_signals

restore_signals()


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A group that outlives its test would change what later tests find."""
    yield
    assert not dist.is_initialized(), "this test left torch.distributed initialised"

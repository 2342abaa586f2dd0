"""What ranks raise where they cannot go on together."""

from __future__ import annotations


class ConsensusError(RuntimeError):
    """The ranks of a decision group do not agree on what they are doing, or one has failed."""


class ConsensusTimeout(ConsensusError):
    """A rank did not arrive; the message names it."""

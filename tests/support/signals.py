"""Signals as a shell in the foreground leaves them, however the tests were started."""

from __future__ import annotations

import signal


def restore_signals() -> None:
    """Answer SIGINT and SIGTERM, in this process and in those that it starts from now on.

    A shell starts what it puts in the background (`nohup pytest &`) with SIGINT ignored, and what
    is ignored is inherited.
    """
    for number, answer in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, answer)

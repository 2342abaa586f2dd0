"""What holds for all tests: children answer signals, however pytest itself was started."""

from support.signals import restore_signals

restore_signals()

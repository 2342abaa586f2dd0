"""The parser that a command begins with."""

from __future__ import annotations

import argparse
from typing import Any


def flags_of(program: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return an empty parser that shows its description as it is written.

    Args:
        program: as users type it, such as "fastcache audit".
        description: the module's docstring.
        **options: others of argparse.
    """
    shown = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=program, description=description, formatter_class=shown, **options
    )

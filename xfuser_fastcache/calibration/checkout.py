"""The embedded toys, which a checkout of the project has and an installed package has not."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

# The folder that the package lies in: the checkout, or where packages are installed.
ROOT = Path(__file__).resolve().parents[2]


def toys_of_checkout() -> Path | None:
    """Return the folder of the embedded toys; None outside of a checkout."""
    toys = ROOT / "toys"
    return toys if (toys / "captions.py").is_file() else None


def is_toy(model: str) -> bool:
    """Say whether a model's folder is one of the embedded toys."""
    toys = toys_of_checkout()
    return toys is not None and Path(model).resolve().parent == toys


def toy_module(name: str) -> ModuleType | None:
    """Return a module of the toys, such as "captions"; None outside of a checkout."""
    if toys_of_checkout() is None:
        return None
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return import_module(f"toys.{name}")

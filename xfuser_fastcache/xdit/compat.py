"""Which xfuser this package knows, what it says about any other, and what xfuser would run on."""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any

SUPPORTED = "0.7"
INSTALL = 'pip install "xfuser>=0.7,<0.8"'


class IncompatibleXfuserError(RuntimeError):
    """The installed xfuser is not the one this package was written against."""


def check_xfuser_version(expected: str = SUPPORTED) -> str:
    """Return the installed xfuser version, or say what was expected.

    The version is read from the installed metadata, so xfuser itself is not imported.

    Args:
        expected: the minor release that the caller was written against.

    Returns:
        The version string, for example ``"0.7.0"``.

    Raises:
        IncompatibleXfuserError: xfuser is missing, or of another minor release.
    """
    try:
        version = importlib.metadata.version("xfuser")
    except importlib.metadata.PackageNotFoundError as error:
        raise IncompatibleXfuserError(
            f"xfuser is not installed; expected {expected}.x. Install it with: {INSTALL}"
        ) from error
    if version.split("+")[0].split(".")[:2] != expected.split("."):
        raise IncompatibleXfuserError(
            f"xfuser {version} is installed; expected {expected}.x, whose internals are known "
            f"here. Install it with: {INSTALL}"
        )
    return version


def has_accelerator() -> bool:
    """Whether xfuser would find a device of a kind that it supports."""
    import torch  # here, because importing xfuser_fastcache imports this module, and stays light

    with contextlib.suppress(ModuleNotFoundError):
        import torch_musa  # noqa: F401  # registers torch.musa, as xfuser.envs does
    kinds = [getattr(torch, name, None) for name in ("cuda", "musa", "npu")]
    return any(kind is not None and kind.is_available() for kind in (*kinds, torch.backends.mps))


def require(module: Any, path: str) -> Any:
    """Return ``module.path``, or name exactly what is missing.

    Args:
        module: an imported module.
        path: attribute names joined by dots, for example ``"Class.method"``.

    Returns:
        The attribute's value.

    Raises:
        IncompatibleXfuserError: any part of the path does not exist.
    """
    value = module
    for name in path.split("."):
        try:
            value = getattr(value, name)
        except AttributeError as error:
            raise IncompatibleXfuserError(
                f"{module.__name__}.{path} does not exist, but it has to be replaced; this xfuser "
                f"is not the {SUPPORTED}.x that is known here. Install it with: {INSTALL}"
            ) from error
    return value


def replace(module: Any, path: str, value: Any) -> Any:
    """Set ``module.path``, which must exist, and return what stood there."""
    previous = require(module, path)
    owner, _, name = path.rpartition(".")
    setattr(require(module, owner) if owner else module, name, value)
    return previous

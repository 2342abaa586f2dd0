"""Which xfuser this package knows, what it says about any other, and what xfuser would run on."""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any

TESTED = ("0.7.0",)
# Minor releases that are tried: what is changed there is probed, and left alone where it is gone.
TRIED = ("0.7", "0.8")
# Environment variable that switches the CPU platform on, as `enable_cpu_platform` does.
CPU_SWITCH = "XFUSER_FASTCACHE_CPU"
INSTALL = f'pip install "xfuser=={TESTED[-1]}"'


class IncompatibleXfuserError(RuntimeError):
    """The installed xfuser is not the one this package was written against."""


def check_xfuser_version() -> str:
    """Return the installed xfuser version, or say which are tried.

    The version is read from the installed metadata, so xfuser itself is not imported.

    Raises:
        IncompatibleXfuserError: xfuser is missing, or of a minor release that is not tried.
    """
    expected = " or ".join(f"{minor}.x" for minor in TRIED)
    try:
        version = importlib.metadata.version("xfuser")
    except importlib.metadata.PackageNotFoundError as error:
        raise IncompatibleXfuserError(
            f"xfuser is not installed; expected {expected}. Install it with: {INSTALL}"
        ) from error
    if ".".join(version.split("+")[0].split(".")[:2]) not in TRIED:
        raise IncompatibleXfuserError(
            f"xfuser {version} is installed; expected {expected}. Install it with: {INSTALL}"
        )
    return version


def has_accelerator() -> bool:
    """Whether xfuser would find a device of a kind that it supports."""
    import torch  # here, because importing xfuser_fastcache imports this module, and stays light

    with contextlib.suppress(ModuleNotFoundError):
        import torch_musa  # noqa: F401  # registers torch.musa, as xfuser.envs does
    kinds = [getattr(torch, name, None) for name in ("cuda", "musa", "npu")]
    return any(kind is not None and kind.is_available() for kind in (*kinds, torch.backends.mps))


def without_accelerator(error: Exception) -> Exception:
    """Say how xfuser runs without an accelerator, where it is that which its import misses."""
    if not isinstance(error, NotImplementedError):
        return error
    return NotImplementedError(
        f"{error}. Without an accelerator xfuser runs on the CPU over gloo, for tests and for "
        "trying things out: call xfuser_fastcache.xdit.cpu_platform.enable_cpu_platform() before "
        f"the first import of xfuser, or set {CPU_SWITCH}=1 before the import of xfuser_fastcache"
    )


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
                f"is not the {TESTED[-1]} that is known here. Install it with: {INSTALL}"
            ) from error
    return value


def replace(module: Any, path: str, value: Any) -> Any:
    """Set ``module.path``, which must exist, and return what stood there."""
    previous = require(module, path)
    owner, _, name = path.rpartition(".")
    setattr(require(module, owner) if owner else module, name, value)
    return previous

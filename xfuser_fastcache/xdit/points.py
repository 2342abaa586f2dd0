"""The places in xfuser that are changed: each probed, and left alone by itself where it is gone."""

from __future__ import annotations

import ast
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from xfuser_fastcache.xdit.compat import (
    TESTED,
    IncompatibleXfuserError,
    check_xfuser_version,
    require,
)

logger = logging.getLogger("xfuser_fastcache")


@dataclass(frozen=True)
class Patch:
    """What is changed in one module of xfuser.

    Attributes:
        brings: what works by it, in words.
        needs: paths of the attributes that are replaced.
        apply: patches the module in place.
    """

    brings: str
    needs: tuple[str, ...]
    apply: Callable[[ModuleType], None]

    def __call__(self, module: ModuleType) -> None:
        """Patch the module, or say what does not work without.

        Raises:
            IncompatibleXfuserError: xfuser is no release that is tried.
        """
        version = check_xfuser_version()
        if version not in TESTED:
            _warn_of(version)
        try:
            for path in self.needs:
                require(module, path)
        except IncompatibleXfuserError as error:
            logger.warning("%s does not work here: %s", self.brings, error)
            return
        self.apply(module)


# Module of xfuser -> what is changed there; `integration` fills it.
PATCHES: dict[str, Patch] = {}


@functools.cache
def _warn_of(version: str) -> None:
    found = [f"{name}: {', '.join(gone) or 'all there'}" for name, gone in probed().items()]
    logger.warning(
        "xfuser %s was not tested with this package, which knows %s. Probed, with what is gone: %s",
        version,
        ", ".join(TESTED),
        "; ".join(found),
    )


def probed() -> dict[str, list[str]]:
    """Return which attributes are missing in each module that is changed; xfuser is not imported.

    Raises:
        IncompatibleXfuserError: xfuser is not installed.
    """
    spec = importlib.util.find_spec("xfuser")
    if spec is None or not spec.submodule_search_locations:
        raise IncompatibleXfuserError("xfuser is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return {name: list(_missing(folder, name, patch.needs)) for name, patch in PATCHES.items()}


def _missing(folder: Path, name: str, needs: tuple[str, ...]) -> Iterator[str]:
    file = folder.joinpath(*name.split(".")[1:]).with_suffix(".py")
    if not file.is_file():
        yield "the module"
        return
    defined = dict(_defined(ast.parse(file.read_bytes())))
    yield from (path for path in needs if path not in defined)


def _defined(tree: ast.Module | ast.ClassDef, inside: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Yield the classes and functions of a module by their paths."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inside + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _defined(node, f"{inside}{node.name}.")


def integration_rows(missing: Mapping[str, list[str]]) -> list[dict[str, str]]:
    """Return the probes as rows for people: where, what works by it, what is missing.

    Args:
        missing: what `probed` returned.
    """
    return [
        {"module": name, "brings": PATCHES[name].brings, "missing": ", ".join(gone)}
        for name, gone in missing.items()
    ]

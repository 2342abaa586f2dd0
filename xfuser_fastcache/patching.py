"""Changes modules of other packages as they load, and takes every change back."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Lets the finders behind it find a module and patches it as soon as it has run.

    Args:
        patches: what is called with a module, by the module's name.
        explained: what makes a better error of one that a module's import raises, likewise.
    """

    def __init__(
        self,
        patches: Mapping[str, Callable[[ModuleType], None]],
        explained: Mapping[str, Callable[[Exception], Exception]] | None = None,
    ):
        self.patches = patches
        self.explained = explained or {}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Return the spec that the finders behind give, with a loader that patches the module."""
        patch, explain = self.patches.get(fullname), self.explained.get(fullname)
        if patch is None and explain is None:
            return None
        # Only those behind: two finders of this kind that asked each other would never end.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find_spec = getattr(finder, "find_spec", None)
            spec = None if find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            try:
                execute(module)
            except Exception as error:
                if explain is None:
                    raise
                raise explain(error) from error
            if patch is not None:
                patch(module)

        # On the instance, so that the loader keeps its type and everything else it offers.
        spec.loader.exec_module = execute_and_patch
        return spec


class AliasFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes names of ours importable under module names that nobody else has.

    Put it last in `sys.meta_path`: then a module that exists is found first.

    Args:
        aliases: by module name, the names that it offers, each as `(module, attribute)`.
    """

    def __init__(self, aliases: Mapping[str, Mapping[str, tuple[str, str]]]):
        self.aliases = aliases

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Return a spec for the names that are listed, None for all others."""
        if fullname not in self.aliases:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module."""
        for name, (home, attribute) in self.aliases[module.__name__].items():
            setattr(module, name, getattr(importlib.import_module(home), attribute))
        module.__doc__ = "Names of xfuser_fastcache under the module name of FastCache's documents."


class Changes:
    """What was set in other packages' modules and classes; `undo` takes all of it back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def wrap(self, owner: Any, name: str, around: Callable[[Any], Callable[..., Any]]) -> None:
        """Put `around(original)` in place of a function or method.

        Args:
            owner: the module or class that defines it itself.
            name: of the function.
            around: given the plain function, also where it is a class or static method.
        """
        previous = vars(owner)[name]
        original = getattr(previous, "__func__", previous)
        made: Any = functools.wraps(original)(around(original))
        if isinstance(previous, (classmethod, staticmethod)):
            made = type(previous)(made)
        setattr(owner, name, made)
        self._undo.append(functools.partial(setattr, owner, name, previous))

    def add(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute that the owner itself does not have."""
        setattr(owner, name, value)
        self._undo.append(functools.partial(delattr, owner, name))

    def undo(self) -> None:
        """Put back what stood there before; calling again changes nothing."""
        while self._undo:
            self._undo.pop()()

"""`Declared`: a registry of the objects that the modules of a package declare, each under the name of its module."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from ..engine.errors import ConfigError

T = TypeVar("T")


class Declared(Generic[T]):
    """The objects that the modules of a package declare, by the name of the module.

    The names come from a listing of the package. A module is imported when its object is first asked for.

    Args:
        package: Dotted name of the package.
        path: The folders of the package.
        attribute: Name of the attribute of each module that holds the object.
        setting: Name of the setting that takes one of the names, for messages.
    """

    def __init__(self, package: str, path: Iterable[str], attribute: str, setting: str) -> None:
        self.names = tuple(sorted(module.name for module in pkgutil.iter_modules(path)))
        self._package, self._attribute, self._setting = package, attribute, setting

    def __getitem__(self, name: str) -> T:
        """Returns the object that the module of a name declares.

        Raises:
            ConfigError: No module of the package has this name.
        """
        if name not in self.names:
            raise ConfigError(f"{self._setting} must be one of {', '.join(self.names)}; got {name!r}")
        thing: T = getattr(importlib.import_module(f".{name}", self._package), self._attribute)
        return thing

    def items(self) -> Iterator[tuple[str, T]]:
        """Yields (name, object) for every module."""
        return ((name, self[name]) for name in self.names)

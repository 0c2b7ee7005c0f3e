"""Package faces that load a name when it is first used (PEP 562), so that importing a package costs next to nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_face(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes a package's module-level `__getattr__` and `__dir__`.

    Args:
        package: The package's `__name__`.
        home: Public name -> the module of the package that defines it.

    Returns:
        The two functions, to be bound to these names in the package's `__init__`.
    """

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{home[name]}", package), name)

    return load, lambda: list(sys.modules[package].__all__)

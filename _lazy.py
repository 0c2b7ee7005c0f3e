"""Package faces that load a name when it is first used (PEP 562), so that importing a package costs next to nothing.

A face names each export twice: once under TYPE_CHECKING, for type checkers, and once in the table that it passes to
`lazy_face`, from which `__all__` is derived.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_face(
    package: str, exports: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes a package's module-level `__getattr__`, `__dir__` and `__all__`.

    Args:
        package: The package's `__name__`.
        exports: Module of the package -> the public names that it defines.

    Returns:
        The two functions and the sorted list of names, to be bound to these three names in the package's `__init__`.

    Raises:
        ValueError: Two modules export the same name.
    """
    home = {name: module for module, names in exports.items() for name in names}
    if len(home) < sum(map(len, exports.values())):
        raise ValueError(f"package {package!r} exports a name from two modules")

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{home[name]}", package), name)

    # The order that linters ask of `__all__`: constants, classes, functions.
    names = sorted(home, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    return load, lambda: list(names), names

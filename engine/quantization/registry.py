"""Finds quantization schemes by name. The names are those of the modules in `schemes/`.

A module of a scheme loads torch, so it is imported when its scheme is asked for; checking a name imports none.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from . import schemes

if TYPE_CHECKING:
    from .scheme import QuantizationScheme

__all__ = ["find_scheme", "scheme_names"]


def scheme_names() -> list[str]:
    """Returns the names that `quantization` may have: those of the modules, with hyphens for underscores."""
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(schemes.__path__))


def find_scheme(name: str | None) -> type[QuantizationScheme]:
    """Returns the scheme of a name, which is the `SCHEME` of its module.

    Args:
        name: One of `scheme_names()`; None for full precision.
    """
    if name is None:
        from .full_precision import FullPrecision

        return FullPrecision
    assert name in scheme_names(), f"{name!r} is no scheme; EngineConfig checks the name"
    return importlib.import_module(f"{schemes.__name__}.{name.replace('-', '_')}").SCHEME

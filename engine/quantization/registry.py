"""`find_scheme`: finds a quantization scheme by its name, which is the name of its module in `schemes/`.

The module of a scheme imports torch, so it is imported only when the scheme is needed. Checking a name imports no
module.
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
    """Returns the allowed values of `quantization`: modules of `schemes/`, with hyphens for underscores."""
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(schemes.__path__))


def find_scheme(name: str | None) -> type[QuantizationScheme]:
    """Returns the class of a scheme, which is the constant `SCHEME` of its module.

    Args:
        name: One of `scheme_names()`; None for full precision.
    """
    if name is None:
        from .full_precision import FullPrecision

        return FullPrecision
    assert name in scheme_names(), f"{name!r} is no scheme; EngineConfig checks the name"
    return importlib.import_module(f"{schemes.__name__}.{name.replace('-', '_')}").SCHEME

"""The input of a job: its files, their format, columns and number of rows, and the dataset of the rows.

This module imports a public name only when the name is used (PEP 562), so the formats can be listed without Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_face

if TYPE_CHECKING:
    from .base import READ_ERROR as READ_ERROR
    from .base import READ_ROW as READ_ROW
    from .base import InputFile as InputFile
    from .base import Unit as Unit
    from .source import Source as Source

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "base": (
            "READ_ERROR",
            "READ_ROW",
            "InputFile",
            "Unit",
        ),
        "source": ("Source",),
    },
)

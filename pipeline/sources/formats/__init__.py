"""The formats of input files: each module declares one as `FORMAT`, and names it. See docs/recipes/format.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from ...declared import Declared
from ..tables import TABLES

if TYPE_CHECKING:
    from ..format import SourceFormat

    InputFormat: TypeAlias = str

FORMATS: Declared[SourceFormat] = Declared(__name__, __path__, "FORMAT", "format")

if not TYPE_CHECKING:
    InputFormat = Literal[tuple(sorted((*FORMATS.names, *TABLES.names)))]

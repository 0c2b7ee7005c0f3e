"""The formats of an output: each module declares one as `FORMAT`, and names it. See docs/recipes/format.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from ...declared import Declared

if TYPE_CHECKING:
    from ..format import SinkFormat

    OutputFormat: TypeAlias = str

FORMATS: Declared[SinkFormat] = Declared(__name__, __path__, "FORMAT", "output_format")

if not TYPE_CHECKING:
    OutputFormat = Literal[FORMATS.names]

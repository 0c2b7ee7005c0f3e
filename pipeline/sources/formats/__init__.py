"""The formats of input files: each module declares one as `FORMAT`, and the module's name is its name in a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from ...declared import Declared
from ..tables import TABLES

if TYPE_CHECKING:
    from ..base import SourceFormat

    InputFormat: TypeAlias = str

FORMATS: Declared[SourceFormat] = Declared(__name__, __path__, "FORMAT", "format")

if not TYPE_CHECKING:
    InputFormat = Literal[(*FORMATS.names, *TABLES.names)]

"""The kinds of tables: each module declares one as `TABLE`, and names it. See docs/recipes/format.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...declared import Declared

if TYPE_CHECKING:
    from ..format import TableKind

TABLES: Declared[TableKind] = Declared(__name__, __path__, "TABLE", "format")

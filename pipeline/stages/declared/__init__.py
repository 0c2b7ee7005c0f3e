"""The stages before and after an engine: each module declares one as `STAGE`. See docs/recipes/stage.md."""

from __future__ import annotations

from typing import Any

from ...declared import Declared
from ..declaration import StageDeclaration

_found: Declared[StageDeclaration[Any]] = Declared(__name__, __path__, "STAGE", "stage")

STAGES = tuple(sorted((stage for _, stage in _found.items()), key=lambda stage: stage.place))
"""The stages in the order in which they run."""

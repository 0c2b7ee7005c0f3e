"""Every stage that a file of this room declares, found by reading the room."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from .declaration import StageDeclaration


def _find_stages() -> tuple[StageDeclaration[Any], ...]:
    names = [one.name for one in pkgutil.iter_modules([str(Path(__file__).parent)]) if not one.ispkg]
    modules = [importlib.import_module(f".{name}", __package__) for name in names if name != Path(__file__).stem]
    found = [module.STAGE for module in modules if hasattr(module, "STAGE")]
    return tuple(sorted(found, key=lambda stage: stage.place))


STAGES = _find_stages()
"""The stages in the order in which they run."""

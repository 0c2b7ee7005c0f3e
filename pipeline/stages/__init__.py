"""The steps of a row: one file, one stage. `base.py` says what a stage is; docs/recipes/stage.md how to add one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import BatchStage, Row, RowError, Stage
    from .chat_template import ChatTemplateStage
    from .detokenize import DetokenizeStage
    from .generate import GenerateStage
    from .tokenize import TokenizeStage
    from .user_function import PostprocessStage, PreprocessStage

__all__ = [
    "BatchStage",
    "ChatTemplateStage",
    "DetokenizeStage",
    "GenerateStage",
    "PostprocessStage",
    "PreprocessStage",
    "Row",
    "RowError",
    "Stage",
    "TokenizeStage",
]

_HOME = {
    "BatchStage": "base",
    "ChatTemplateStage": "chat_template",
    "DetokenizeStage": "detokenize",
    "GenerateStage": "generate",
    "PostprocessStage": "user_function",
    "PreprocessStage": "user_function",
    "Row": "base",
    "RowError": "base",
    "Stage": "base",
    "TokenizeStage": "tokenize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""The steps of a row: one file, one stage. `base.py` says what a stage is; docs/recipes/stage.md how to add one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_face

if TYPE_CHECKING:
    from .answer import AnswerStage, ReasoningStage, ToolCallStage
    from .base import BatchStage, Row, RowError, Stage
    from .chat_template import ChatTemplateStage
    from .detokenize import DetokenizeStage
    from .engine import EngineStage
    from .generate import GenerateStage
    from .http import HttpRequestStage
    from .pool import PoolStage
    from .serve import ServeDeploymentStage
    from .tokenize import TokenizeStage
    from .user_function import PostprocessStage, PreprocessStage

__all__ = [
    "AnswerStage",
    "BatchStage",
    "ChatTemplateStage",
    "DetokenizeStage",
    "EngineStage",
    "GenerateStage",
    "HttpRequestStage",
    "PoolStage",
    "PostprocessStage",
    "PreprocessStage",
    "ReasoningStage",
    "Row",
    "RowError",
    "ServeDeploymentStage",
    "Stage",
    "TokenizeStage",
    "ToolCallStage",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "AnswerStage": "answer",
        "BatchStage": "base",
        "ChatTemplateStage": "chat_template",
        "DetokenizeStage": "detokenize",
        "EngineStage": "engine",
        "GenerateStage": "generate",
        "HttpRequestStage": "http",
        "PoolStage": "pool",
        "PostprocessStage": "user_function",
        "PreprocessStage": "user_function",
        "ReasoningStage": "answer",
        "Row": "base",
        "RowError": "base",
        "ServeDeploymentStage": "serve",
        "Stage": "base",
        "TokenizeStage": "tokenize",
        "ToolCallStage": "answer",
    },
)

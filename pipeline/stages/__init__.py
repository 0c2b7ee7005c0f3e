"""The steps of a row: one file, one stage. `base.py` says what a stage is; docs/recipes/stage.md how to add one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_face

if TYPE_CHECKING:
    from .answer import AnswerStage as AnswerStage
    from .answer import ReasoningStage as ReasoningStage
    from .answer import ToolCallStage as ToolCallStage
    from .base import BatchStage as BatchStage
    from .base import Row as Row
    from .base import RowError as RowError
    from .base import Stage as Stage
    from .chat_template import ChatTemplateStage as ChatTemplateStage
    from .detokenize import DetokenizeStage as DetokenizeStage
    from .engine import EngineStage as EngineStage
    from .generate import GenerateStage as GenerateStage
    from .http import HttpRequestStage as HttpRequestStage
    from .pool import PoolStage as PoolStage
    from .serve import ServeDeploymentStage as ServeDeploymentStage
    from .tokenize import TokenizeStage as TokenizeStage
    from .user_function import PostprocessStage as PostprocessStage
    from .user_function import PreprocessStage as PreprocessStage

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "answer": (
            "AnswerStage",
            "ReasoningStage",
            "ToolCallStage",
        ),
        "base": (
            "BatchStage",
            "Row",
            "RowError",
            "Stage",
        ),
        "chat_template": ("ChatTemplateStage",),
        "detokenize": ("DetokenizeStage",),
        "engine": ("EngineStage",),
        "generate": ("GenerateStage",),
        "http": ("HttpRequestStage",),
        "pool": ("PoolStage",),
        "serve": ("ServeDeploymentStage",),
        "tokenize": ("TokenizeStage",),
        "user_function": (
            "PostprocessStage",
            "PreprocessStage",
        ),
    },
)

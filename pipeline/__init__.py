"""Rows in, rows out: datasets through the engine, on Ray Data.

The face is lazy (PEP 562): importing it loads neither ray nor torch; the first name that needs them does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import (
        ChatTemplateStageConfig,
        DetokenizeStageConfig,
        EngineProcessorConfig,
        ProcessorConfig,
        TokenizerStageConfig,
        vLLMEngineProcessorConfig,
    )
    from .errors import RowFailedError, find_millrace_error
    from .job import JobConfig, load_job, run_job
    from .processor import Processor, build_llm_processor, build_processor
    from .report import JobSummary

__all__ = [
    "ChatTemplateStageConfig",
    "DetokenizeStageConfig",
    "EngineProcessorConfig",
    "JobConfig",
    "JobSummary",
    "Processor",
    "ProcessorConfig",
    "RowFailedError",
    "TokenizerStageConfig",
    "build_llm_processor",
    "build_processor",
    "find_millrace_error",
    "load_job",
    "run_job",
    "vLLMEngineProcessorConfig",
]

_HOME = {
    "ChatTemplateStageConfig": "config",
    "DetokenizeStageConfig": "config",
    "EngineProcessorConfig": "config",
    "JobConfig": "job",
    "JobSummary": "report",
    "Processor": "processor",
    "ProcessorConfig": "config",
    "RowFailedError": "errors",
    "TokenizerStageConfig": "config",
    "build_llm_processor": "processor",
    "build_processor": "processor",
    "find_millrace_error": "errors",
    "load_job": "job",
    "run_job": "job",
    "vLLMEngineProcessorConfig": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

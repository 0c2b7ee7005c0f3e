"""Rows in, rows out: datasets through the engine, on Ray Data.

The face is lazy (PEP 562): importing it loads neither ray nor torch; the first name that needs them does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_face

if TYPE_CHECKING:
    from .builder import ProcessorBuilder, build_llm_processor, build_processor
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
    from .processor import Processor
    from .report import JobSummary
    from .stage_plan import CustomStage

__all__ = [
    "ChatTemplateStageConfig",
    "CustomStage",
    "DetokenizeStageConfig",
    "EngineProcessorConfig",
    "JobConfig",
    "JobSummary",
    "Processor",
    "ProcessorBuilder",
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

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "ChatTemplateStageConfig": "config",
        "CustomStage": "stage_plan",
        "DetokenizeStageConfig": "config",
        "EngineProcessorConfig": "config",
        "JobConfig": "job",
        "JobSummary": "report",
        "Processor": "processor",
        "ProcessorBuilder": "builder",
        "ProcessorConfig": "config",
        "RowFailedError": "errors",
        "TokenizerStageConfig": "config",
        "build_llm_processor": "builder",
        "build_processor": "builder",
        "find_millrace_error": "errors",
        "load_job": "job",
        "run_job": "job",
        "vLLMEngineProcessorConfig": "config",
    },
)

"""Rows in, rows out: datasets through the engine, on Ray Data.

The face is lazy (PEP 562): importing it loads neither ray nor torch; the first name that needs them does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_face

if TYPE_CHECKING:
    from .builder import (
        ProcessorBuilder,
        build_llm_processor,
        build_processor,
    )
    from .config import (
        ChatTemplateStageConfig,
        DetokenizeStageConfig,
        EngineProcessorConfig,
        PrepareMultimodalStageConfig,
        ProcessorConfig,
        StageConfig,
        TokenizerStageConfig,
        vLLMEngineProcessorConfig,
    )
    from .errors import (
        DeploymentError,
        RowFailedError,
        find_millrace_error,
    )
    from .job import (
        JobConfig,
        load_job,
        resume_job,
        retry_failed,
        run_job,
    )
    from .processor import (
        Processor,
    )
    from .report import (
        JobSummary,
    )
    from .request_config import (
        HttpRequestProcessorConfig,
        HttpRequestStageConfig,
        ServeDeploymentProcessorConfig,
    )
    from .sglang import SGLangEngineProcessorConfig
    from .stage_plan import (
        CustomStage,
        StageInfo,
    )
    from .stages import (
        BatchStage,
        Stage,
    )
    from .writing import (
        write_results,
    )

__all__ = [
    "BatchStage",
    "ChatTemplateStageConfig",
    "CustomStage",
    "DeploymentError",
    "DetokenizeStageConfig",
    "EngineProcessorConfig",
    "HttpRequestProcessorConfig",
    "HttpRequestStageConfig",
    "JobConfig",
    "JobSummary",
    "PrepareMultimodalStageConfig",
    "Processor",
    "ProcessorBuilder",
    "ProcessorConfig",
    "RowFailedError",
    "SGLangEngineProcessorConfig",
    "ServeDeploymentProcessorConfig",
    "Stage",
    "StageConfig",
    "StageInfo",
    "TokenizerStageConfig",
    "build_llm_processor",
    "build_processor",
    "find_millrace_error",
    "load_job",
    "resume_job",
    "retry_failed",
    "run_job",
    "vLLMEngineProcessorConfig",
    "write_results",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "BatchStage": "stages",
        "ChatTemplateStageConfig": "config",
        "CustomStage": "stage_plan",
        "DeploymentError": "errors",
        "DetokenizeStageConfig": "config",
        "EngineProcessorConfig": "config",
        "HttpRequestProcessorConfig": "request_config",
        "HttpRequestStageConfig": "request_config",
        "JobConfig": "job",
        "JobSummary": "report",
        "PrepareMultimodalStageConfig": "config",
        "Processor": "processor",
        "ProcessorBuilder": "builder",
        "ProcessorConfig": "config",
        "RowFailedError": "errors",
        "SGLangEngineProcessorConfig": "sglang",
        "ServeDeploymentProcessorConfig": "request_config",
        "Stage": "stages",
        "StageConfig": "config",
        "StageInfo": "stage_plan",
        "TokenizerStageConfig": "config",
        "build_llm_processor": "builder",
        "build_processor": "builder",
        "find_millrace_error": "errors",
        "load_job": "job",
        "resume_job": "job",
        "retry_failed": "job",
        "run_job": "job",
        "vLLMEngineProcessorConfig": "config",
        "write_results": "writing",
    },
)

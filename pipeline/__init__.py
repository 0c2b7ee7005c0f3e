"""Rows in, rows out: datasets through the engine, on Ray Data.

The face is lazy (PEP 562): importing it loads neither ray nor torch; the first name that needs them does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_face

if TYPE_CHECKING:
    from .errors import DeploymentError as DeploymentError
    from .errors import RowFailedError as RowFailedError
    from .errors import find_millrace_error as find_millrace_error
    from .job.run import JobConfig as JobConfig
    from .job.run import load_job as load_job
    from .job.run import resume_job as resume_job
    from .job.run import retry_failed as retry_failed
    from .job.run import run_job as run_job
    from .job.writing import write_results as write_results
    from .processor.builder import ProcessorBuilder as ProcessorBuilder
    from .processor.builder import build_llm_processor as build_llm_processor
    from .processor.builder import build_processor as build_processor
    from .processor.config import ChatTemplateStageConfig as ChatTemplateStageConfig
    from .processor.config import DetokenizeStageConfig as DetokenizeStageConfig
    from .processor.config import EngineProcessorConfig as EngineProcessorConfig
    from .processor.config import PrepareMultimodalStageConfig as PrepareMultimodalStageConfig
    from .processor.config import ProcessorConfig as ProcessorConfig
    from .processor.config import StageConfig as StageConfig
    from .processor.config import TokenizerStageConfig as TokenizerStageConfig
    from .processor.config import vLLMEngineProcessorConfig as vLLMEngineProcessorConfig
    from .processor.processor import Processor as Processor
    from .processor.request_config import HttpRequestProcessorConfig as HttpRequestProcessorConfig
    from .processor.request_config import HttpRequestStageConfig as HttpRequestStageConfig
    from .processor.request_config import ServeDeploymentProcessorConfig as ServeDeploymentProcessorConfig
    from .processor.sglang import SGLangEngineProcessorConfig as SGLangEngineProcessorConfig
    from .processor.stage_plan import CustomStage as CustomStage
    from .processor.stage_plan import StageInfo as StageInfo
    from .report import JobSummary as JobSummary
    from .stages import BatchStage as BatchStage
    from .stages import Stage as Stage

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "errors": (
            "DeploymentError",
            "RowFailedError",
            "find_millrace_error",
        ),
        "job.run": (
            "JobConfig",
            "load_job",
            "resume_job",
            "retry_failed",
            "run_job",
        ),
        "job.writing": ("write_results",),
        "processor.builder": (
            "ProcessorBuilder",
            "build_llm_processor",
            "build_processor",
        ),
        "processor.config": (
            "ChatTemplateStageConfig",
            "DetokenizeStageConfig",
            "EngineProcessorConfig",
            "PrepareMultimodalStageConfig",
            "ProcessorConfig",
            "StageConfig",
            "TokenizerStageConfig",
            "vLLMEngineProcessorConfig",
        ),
        "processor.processor": ("Processor",),
        "processor.request_config": (
            "HttpRequestProcessorConfig",
            "HttpRequestStageConfig",
            "ServeDeploymentProcessorConfig",
        ),
        "processor.sglang": ("SGLangEngineProcessorConfig",),
        "processor.stage_plan": (
            "CustomStage",
            "StageInfo",
        ),
        "report": ("JobSummary",),
        "stages": (
            "BatchStage",
            "Stage",
        ),
    },
)

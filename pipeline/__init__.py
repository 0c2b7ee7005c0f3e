"""Processors and jobs, which run models over datasets on Ray Data.

This module imports a public name only when the name is used (PEP 562), so importing it loads neither ray nor torch.
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
    from .processor.config import EngineProcessorConfig as EngineProcessorConfig
    from .processor.config import PrepareMultimodalStageConfig as PrepareMultimodalStageConfig
    from .processor.config import ProcessorConfig as ProcessorConfig
    from .processor.config import vLLMEngineProcessorConfig as vLLMEngineProcessorConfig
    from .processor.processor import Processor as Processor
    from .processor.request_config import HttpRequestProcessorConfig as HttpRequestProcessorConfig
    from .processor.request_config import HttpRequestStageConfig as HttpRequestStageConfig
    from .processor.request_config import ServeDeploymentProcessorConfig as ServeDeploymentProcessorConfig
    from .processor.sglang import SGLangEngineProcessorConfig as SGLangEngineProcessorConfig
    from .processor.stage_spec import CustomStage as CustomStage
    from .processor.stage_spec import StageInfo as StageInfo
    from .report import JobSummary as JobSummary
    from .stages.base import BatchStage as BatchStage
    from .stages.base import Stage as Stage
    from .stages.declared.chat_template import ChatTemplateStageConfig as ChatTemplateStageConfig
    from .stages.declared.detokenize import DetokenizeStageConfig as DetokenizeStageConfig
    from .stages.declared.tokenize import TokenizerStageConfig as TokenizerStageConfig
    from .stages.stage_config import StageConfig as StageConfig

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
            "EngineProcessorConfig",
            "PrepareMultimodalStageConfig",
            "ProcessorConfig",
            "vLLMEngineProcessorConfig",
        ),
        "processor.processor": ("Processor",),
        "processor.request_config": (
            "HttpRequestProcessorConfig",
            "HttpRequestStageConfig",
            "ServeDeploymentProcessorConfig",
        ),
        "processor.sglang": ("SGLangEngineProcessorConfig",),
        "processor.stage_spec": (
            "CustomStage",
            "StageInfo",
        ),
        "report": ("JobSummary",),
        "stages.base": (
            "BatchStage",
            "Stage",
        ),
        "stages.declared.chat_template": ("ChatTemplateStageConfig",),
        "stages.declared.detokenize": ("DetokenizeStageConfig",),
        "stages.stage_config": ("StageConfig",),
        "stages.declared.tokenize": ("TokenizerStageConfig",),
    },
)

"""The inference engine: `LLM` runs a model on prompts. It knows neither Ray nor datasets.

This module is lazy (PEP 562): `import millrace.engine` does not import torch. The first access to a name imports the
module that defines the name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_face
from .env import shorten_spinning

if TYPE_CHECKING:
    from .checking.model_check import ModelCheck as ModelCheck
    from .checking.model_check import check_model as check_model
    from .config import EngineConfig as EngineConfig
    from .engine import EngineStats as EngineStats
    from .engine import LLMEngine as LLMEngine
    from .llm import LLM as LLM
    from .loading.footprint import Footprint as Footprint
    from .loading.model_source import resolve_model as resolve_model
    from .lora.request import LoRARequest as LoRARequest
    from .models.catalog import CatalogEntry as CatalogEntry
    from .models.catalog import model_catalog as model_catalog
    from .outputs import CompletionOutput as CompletionOutput
    from .outputs import Logprob as Logprob
    from .outputs import RequestMetrics as RequestMetrics
    from .outputs import RequestOutput as RequestOutput
    from .pooling.config import PoolerConfig as PoolerConfig
    from .pooling.outputs import ClassificationOutput as ClassificationOutput
    from .pooling.outputs import ClassificationRequestOutput as ClassificationRequestOutput
    from .pooling.outputs import EmbeddingOutput as EmbeddingOutput
    from .pooling.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from .pooling.outputs import PoolingOutput as PoolingOutput
    from .pooling.outputs import PoolingRequestOutput as PoolingRequestOutput
    from .pooling.outputs import ScoringOutput as ScoringOutput
    from .pooling.outputs import ScoringRequestOutput as ScoringRequestOutput
    from .pooling.params import PoolingParams as PoolingParams
    from .quantization.making.quantize import quantize_model as quantize_model
    from .quantization.making.report import QuantizationReport as QuantizationReport
    from .request import EngineOutput as EngineOutput
    from .request import GenerateRequest as GenerateRequest
    from .request import PoolingRequest as PoolingRequest
    from .request import Request as Request
    from .sampling_params import SamplingParams as SamplingParams
    from .structured.params import StructuredOutputsParams as StructuredOutputsParams
    from .text.tokenizer import Tokenizer as Tokenizer

# This call must run before torch is imported. Python runs this file before every other module of the engine.
shorten_spinning()

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "checking.model_check": (
            "ModelCheck",
            "check_model",
        ),
        "config": ("EngineConfig",),
        "engine": (
            "EngineStats",
            "LLMEngine",
        ),
        "llm": ("LLM",),
        "loading.footprint": ("Footprint",),
        "loading.model_source": ("resolve_model",),
        "lora.request": ("LoRARequest",),
        "models.catalog": (
            "CatalogEntry",
            "model_catalog",
        ),
        "outputs": (
            "CompletionOutput",
            "Logprob",
            "RequestMetrics",
            "RequestOutput",
        ),
        "pooling.config": ("PoolerConfig",),
        "pooling.outputs": (
            "ClassificationOutput",
            "ClassificationRequestOutput",
            "EmbeddingOutput",
            "EmbeddingRequestOutput",
            "PoolingOutput",
            "PoolingRequestOutput",
            "ScoringOutput",
            "ScoringRequestOutput",
        ),
        "pooling.params": ("PoolingParams",),
        "quantization.making.quantize": ("quantize_model",),
        "quantization.making.report": ("QuantizationReport",),
        "request": (
            "EngineOutput",
            "GenerateRequest",
            "PoolingRequest",
            "Request",
        ),
        "sampling_params": ("SamplingParams",),
        "structured.params": ("StructuredOutputsParams",),
        "text.tokenizer": ("Tokenizer",),
    },
)

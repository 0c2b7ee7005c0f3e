"""Tokens in, tokens out: the inference engine. It knows neither Ray nor datasets.

The face is lazy (PEP 562): importing it loads no torch; the first name that needs it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_face
from .env import shorten_spinning

if TYPE_CHECKING:
    from .bundled import resolve_model
    from .config import EngineConfig
    from .engine import EngineStats, LLMEngine
    from .footprint import Footprint
    from .llm import LLM
    from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from .pooler_config import PoolerConfig
    from .pooling_outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from .pooling_params import PoolingParams
    from .request import EngineOutput, EngineRequest, GenerateRequest, PoolingRequest
    from .sampling_params import SamplingParams
    from .structured_outputs import StructuredOutputsParams
    from .tokenizer import Tokenizer

__all__ = [
    "LLM",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "EngineOutput",
    "EngineRequest",
    "EngineStats",
    "Footprint",
    "GenerateRequest",
    "LLMEngine",
    "Logprob",
    "PoolerConfig",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequest",
    "PoolingRequestOutput",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "Tokenizer",
    "resolve_model",
]

# Here, because nothing of the engine, torch included, is imported before its face.
shorten_spinning()

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "LLM": "llm",
        "ClassificationOutput": "pooling_outputs",
        "ClassificationRequestOutput": "pooling_outputs",
        "CompletionOutput": "outputs",
        "EmbeddingOutput": "pooling_outputs",
        "EmbeddingRequestOutput": "pooling_outputs",
        "EngineConfig": "config",
        "EngineOutput": "request",
        "EngineRequest": "request",
        "EngineStats": "engine",
        "Footprint": "footprint",
        "GenerateRequest": "request",
        "LLMEngine": "engine",
        "Logprob": "outputs",
        "PoolerConfig": "pooler_config",
        "PoolingOutput": "pooling_outputs",
        "PoolingParams": "pooling_params",
        "PoolingRequest": "request",
        "PoolingRequestOutput": "pooling_outputs",
        "RequestMetrics": "outputs",
        "RequestOutput": "outputs",
        "SamplingParams": "sampling_params",
        "ScoringOutput": "pooling_outputs",
        "ScoringRequestOutput": "pooling_outputs",
        "StructuredOutputsParams": "structured_outputs",
        "Tokenizer": "tokenizer",
        "resolve_model": "bundled",
    },
)

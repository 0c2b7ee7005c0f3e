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
    from .request import GenerateRequest
    from .sampling_params import SamplingParams
    from .structured_outputs import StructuredOutputsParams
    from .tokenizer import Tokenizer

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineStats",
    "Footprint",
    "GenerateRequest",
    "LLMEngine",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
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
        "CompletionOutput": "outputs",
        "EngineConfig": "config",
        "EngineStats": "engine",
        "Footprint": "footprint",
        "GenerateRequest": "request",
        "LLMEngine": "engine",
        "Logprob": "outputs",
        "RequestMetrics": "outputs",
        "RequestOutput": "outputs",
        "SamplingParams": "sampling_params",
        "StructuredOutputsParams": "structured_outputs",
        "Tokenizer": "tokenizer",
        "resolve_model": "bundled",
    },
)

"""Millrace: large language models over datasets.

The public face of the package. Rows stream in, engines stay full, results stream out:

    from millrace import LLM, SamplingParams                  # tokens in, tokens out, in this process
    from millrace import build_llm_processor                  # rows in, rows out, on Ray

Importing it is cheap: a name is loaded from its subpackage when it is first used, so that neither torch nor Ray is
loaded before something needs it, and `LLM` works where Ray is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.errors import (
        ChatTemplateError,
        CheckpointError,
        ConfigError,
        EngineDeadError,
        EngineError,
        MillraceError,
        PlacementError,
        PoolingParamsError,
        PromptError,
        ReplicaDiedError,
        RequestError,
        SamplingParamsError,
        UnsupportedModelError,
        UserError,
    )
    from .engine.inputs import TextPrompt, TokensPrompt
    from .engine.llm import LLM
    from .engine.outputs import CompletionOutput, Logprob, RequestOutput
    from .engine.pooling_outputs import (
        ClassificationRequestOutput,
        EmbeddingRequestOutput,
        PoolingRequestOutput,
        ScoringRequestOutput,
    )
    from .engine.pooling_params import PoolingParams
    from .engine.sampling_params import SamplingParams
    from .engine.structured_outputs import StructuredOutputsParams
    from .pipeline import (
        EngineProcessorConfig,
        Processor,
        ProcessorConfig,
        build_llm_processor,
        build_processor,
        vLLMEngineProcessorConfig,
        write_results,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ChatTemplateError",
    "CheckpointError",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingRequestOutput",
    "EngineDeadError",
    "EngineError",
    "EngineProcessorConfig",
    "Logprob",
    "MillraceError",
    "PlacementError",
    "PoolingParams",
    "PoolingParamsError",
    "PoolingRequestOutput",
    "Processor",
    "ProcessorConfig",
    "PromptError",
    "ReplicaDiedError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SamplingParamsError",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "UnsupportedModelError",
    "UserError",
    "__version__",
    "build_llm_processor",
    "build_processor",
    "vLLMEngineProcessorConfig",
    "write_results",
]

_HOME = {
    "LLM": "engine.llm",
    "ChatTemplateError": "engine.errors",
    "CheckpointError": "engine.errors",
    "ClassificationRequestOutput": "engine.pooling_outputs",
    "CompletionOutput": "engine.outputs",
    "ConfigError": "engine.errors",
    "EmbeddingRequestOutput": "engine.pooling_outputs",
    "EngineDeadError": "engine.errors",
    "EngineError": "engine.errors",
    "EngineProcessorConfig": "pipeline",
    "Logprob": "engine.outputs",
    "MillraceError": "engine.errors",
    "PlacementError": "engine.errors",
    "PoolingParams": "engine.pooling_params",
    "PoolingParamsError": "engine.errors",
    "PoolingRequestOutput": "engine.pooling_outputs",
    "Processor": "pipeline",
    "ProcessorConfig": "pipeline",
    "PromptError": "engine.errors",
    "ReplicaDiedError": "engine.errors",
    "RequestError": "engine.errors",
    "RequestOutput": "engine.outputs",
    "SamplingParams": "engine.sampling_params",
    "SamplingParamsError": "engine.errors",
    "ScoringRequestOutput": "engine.pooling_outputs",
    "StructuredOutputsParams": "engine.structured_outputs",
    "TextPrompt": "engine.inputs",
    "TokensPrompt": "engine.inputs",
    "UnsupportedModelError": "engine.errors",
    "UserError": "engine.errors",
    "build_llm_processor": "pipeline",
    "build_processor": "pipeline",
    "vLLMEngineProcessorConfig": "pipeline",
    "write_results": "pipeline",
}


# Not `_lazy.lazy_face`, which the subpackages share: pytest imports this file by its path too, outside of any package,
# where a relative import has nothing to be relative to.
def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)

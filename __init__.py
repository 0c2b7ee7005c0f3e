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
    from ._version import __version__ as __version__
    from .engine.errors import AdapterError as AdapterError
    from .engine.errors import ChatTemplateError as ChatTemplateError
    from .engine.errors import CheckpointError as CheckpointError
    from .engine.errors import ConfigError as ConfigError
    from .engine.errors import EngineDeadError as EngineDeadError
    from .engine.errors import EngineError as EngineError
    from .engine.errors import MillraceError as MillraceError
    from .engine.errors import PlacementError as PlacementError
    from .engine.errors import PoolingParamsError as PoolingParamsError
    from .engine.errors import PromptError as PromptError
    from .engine.errors import ReplicaDiedError as ReplicaDiedError
    from .engine.errors import RequestError as RequestError
    from .engine.errors import SamplingParamsError as SamplingParamsError
    from .engine.errors import UnsupportedModelError as UnsupportedModelError
    from .engine.errors import UserError as UserError
    from .engine.inputs import EmbedsPrompt as EmbedsPrompt
    from .engine.inputs import TextPrompt as TextPrompt
    from .engine.inputs import TokensPrompt as TokensPrompt
    from .engine.llm import LLM as LLM
    from .engine.lora.request import LoRARequest as LoRARequest
    from .engine.outputs import CompletionOutput as CompletionOutput
    from .engine.outputs import Logprob as Logprob
    from .engine.outputs import RequestOutput as RequestOutput
    from .engine.pooling.outputs import ClassificationRequestOutput as ClassificationRequestOutput
    from .engine.pooling.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from .engine.pooling.outputs import PoolingRequestOutput as PoolingRequestOutput
    from .engine.pooling.outputs import ScoringRequestOutput as ScoringRequestOutput
    from .engine.pooling.params import PoolingParams as PoolingParams
    from .engine.sampling_params import SamplingParams as SamplingParams
    from .engine.structured.params import StructuredOutputsParams as StructuredOutputsParams
    from .pipeline import EngineProcessorConfig as EngineProcessorConfig
    from .pipeline import Processor as Processor
    from .pipeline import ProcessorConfig as ProcessorConfig
    from .pipeline import build_llm_processor as build_llm_processor
    from .pipeline import build_processor as build_processor
    from .pipeline import vLLMEngineProcessorConfig as vLLMEngineProcessorConfig
    from .pipeline import write_results as write_results

_EXPORTS: dict[str, tuple[str, ...]] = {
    "_version": ("__version__",),
    "engine.errors": (
        "AdapterError",
        "ChatTemplateError",
        "CheckpointError",
        "ConfigError",
        "EngineDeadError",
        "EngineError",
        "MillraceError",
        "PlacementError",
        "PoolingParamsError",
        "PromptError",
        "ReplicaDiedError",
        "RequestError",
        "SamplingParamsError",
        "UnsupportedModelError",
        "UserError",
    ),
    "engine.inputs": (
        "EmbedsPrompt",
        "TextPrompt",
        "TokensPrompt",
    ),
    "engine.llm": ("LLM",),
    "engine.lora.request": ("LoRARequest",),
    "engine.outputs": (
        "CompletionOutput",
        "Logprob",
        "RequestOutput",
    ),
    "engine.pooling.outputs": (
        "ClassificationRequestOutput",
        "EmbeddingRequestOutput",
        "PoolingRequestOutput",
        "ScoringRequestOutput",
    ),
    "engine.pooling.params": ("PoolingParams",),
    "engine.sampling_params": ("SamplingParams",),
    "engine.structured.params": ("StructuredOutputsParams",),
    "pipeline": (
        "EngineProcessorConfig",
        "Processor",
        "ProcessorConfig",
        "build_llm_processor",
        "build_processor",
        "vLLMEngineProcessorConfig",
        "write_results",
    ),
}


# Not `_lazy.lazy_face`, which the subpackages share: pytest imports this file by its path too, outside of any package,
# where a relative import has nothing to be relative to.
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOME, key=lambda name: (not name.isupper(), not name[0].isupper(), name))  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)

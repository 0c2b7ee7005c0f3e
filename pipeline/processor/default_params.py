"""The sampling parameters of rows that bring none."""

from __future__ import annotations

from ...engine import SamplingParams, resolve_model
from ...engine.loading.generation_config import default_sampling_params, read_generation_config
from .config import EngineProcessorConfig


def default_params(config: EngineProcessorConfig) -> SamplingParams:
    """Returns the processor's sampling parameters, or, if it has none, those that the model's makers recommend."""
    if config.sampling_params is not None:
        return SamplingParams.from_dict(config.sampling_params)
    if config.engine_config.generation_config != "auto":
        return SamplingParams()
    return default_sampling_params(read_generation_config(resolve_model(config.model_source)))

"""`default_params`: the sampling parameters of rows that bring none."""

from __future__ import annotations

from ...engine import SamplingParams
from ...engine.loading.generation_config import recommended_params
from .config import EngineProcessorConfig


def default_params(config: EngineProcessorConfig) -> SamplingParams:
    """Returns the `sampling_params` of the config; if it has none, the parameters that the model recommends."""
    if config.sampling_params is not None:
        return SamplingParams.from_dict(config.sampling_params)
    return recommended_params(config.engine_config)

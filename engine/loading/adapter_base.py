"""`describe_adapter_base`: what the reader of adapters needs to know about a model, before the model is loaded."""

from __future__ import annotations

from typing import Any

import torch

from ..config import EngineConfig
from ..lora.base import AdapterBase
from ..lora.slots import SlotSizes
from ..models import ModelOptions, build_model
from ..models.registry import describe_model, find_family

__all__ = ["describe_adapter_base"]


def describe_adapter_base(config: EngineConfig, hf_config: Any, head: str | None, dtype: torch.dtype) -> AdapterBase:
    """Returns what the reader of adapters needs to know about a model.

    Args:
        config: Settings of the engine.
        hf_config: The transformers config of the model.
        head: The module after the last layer, as `ModelOptions.head`.
        dtype: Number type of weights and activations.
    """
    # A plain model of one rank, so that every part is there and has its whole shape.
    options = ModelOptions(head=head, adapter_slots=SlotSizes(1, 1), max_model_len=config.max_model_len)
    model = build_model(hf_config, dtype, "meta", options)
    assert model.adapters is not None
    shapes = {name: shape for layer in model.adapters.layers for name, shape in layer.parts.items()}
    # An adapter of a model in a GGUF file has the names of the original checkpoint too.
    weights = find_family(hf_config).weight_map(describe_model(hf_config))
    return AdapterBase(weights, shapes, dtype, config.max_lora_rank, config.download_dir)

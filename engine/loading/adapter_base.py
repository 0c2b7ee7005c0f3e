"""`describe_adapter_base`: what the reader of adapters needs to know about a model, before the model is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..lora.base import AdapterBase
from ..models import ModelOptions, build_model, weight_map
from ..storage import Location

__all__ = ["describe_adapter_base"]


def describe_adapter_base(place: Location, hf_config: Any, dtype: torch.dtype, options: ModelOptions) -> AdapterBase:
    """Returns what the reader of adapters needs to know about a model.

    Args:
        place: Folder of the model.
        hf_config: The transformers config of the model.
        dtype: Number type of weights and activations.
        options: The user's options for the model, with adapter slots.
    """
    assert options.adapter_slots is not None
    # A model of one rank, so that every part is there and has its whole shape.
    alone = replace(options, adapter_slots=replace(options.adapter_slots, num_slots=1))
    model = build_model(hf_config, dtype, "meta", alone)
    assert model.adapters is not None
    shapes = {name: shape for layer in model.adapters.layers for name, shape in layer.parts.items()}
    return AdapterBase(weight_map(place, hf_config, dtype), shapes, dtype, options.adapter_slots.max_rank)

"""`describe_adapter_base`: what the reader of adapters needs to know about a model, before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import EngineConfig
from ..lora.base import AdapterBase
from ..lora.slots import SlotSizes
from ..models import ModelOptions, build_model
from ..models.registry import describe_model, find_family
from ..weights.checkpoint import WeightMap, iter_tensors
from .model_source import locate_model

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
    is_tied = model.spec.tie_word_embeddings
    return AdapterBase(
        weights=weights,
        shapes=shapes,
        dtype=dtype,
        max_rank=config.max_lora_rank,
        tables=frozenset(table.name for table in model.adapters.tables),
        is_tied=is_tied,
        read_own=_own_reader(config, weights, is_tied=is_tied),
        download_dir=config.download_dir,
    )


def _own_reader(config: EngineConfig, weights: WeightMap, *, is_tied: bool) -> Callable[[str], Tensor | None]:
    """Returns a function that reads a tensor of the model's checkpoint by our name, as `AdapterBase.read_own`."""

    def read(ours: str) -> Tensor | None:
        names = {ours, "embed_tokens.weight"} if is_tied and ours == "lm_head.weight" else {ours}
        for name, tensor in iter_tensors(locate_model(config.model, config.hub)):
            if _ours(name, weights) in names:
                return tensor if isinstance(tensor, Tensor) else tensor.read()
        return None

    return read if config.load_format == "auto" else lambda _: None


def _ours(name: str, weights: WeightMap) -> str | None:
    """Returns our name of a checkpoint's tensor; None for a tensor that the family does not know or ignores."""
    try:
        return weights.ours(name)
    except KeyError:
        return None

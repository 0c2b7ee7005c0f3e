"""`LayerForm`: what the trial has found out about the attention of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["LayerForm", "Survey"]


@dataclass(frozen=True, slots=True)
class LayerForm:
    """The attention of one layer of a transformers module.

    Attributes:
        name: Path of the attention module in the model.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads.
        head_dim: Size of a query or key head.
        value_dim: Size of a value head.
        scale: Factor on the product of a query and a key.
        softcap: Smooth limit on the scores; 0 for no limit.
        window: Number of latest tokens that a token attends to, its own included; 0 for all.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float
    window: int


@dataclass(frozen=True, slots=True)
class Survey:
    """What a trial forward pass has found out about a model.

    Attributes:
        layers: The attention layers in the order in which they are called.
        linears: Paths of the linear layers that are called as modules, so that others may take their place.
        hidden_size: Width of the last hidden states.
        vocab_size: Number of tokens that the logits cover, or of rows of the embedding in a model without logits.
        output_type: Class of the outputs of the body, the part before the head.
    """

    layers: tuple[LayerForm, ...]
    linears: frozenset[str]
    hidden_size: int
    vocab_size: int
    output_type: type[Any]

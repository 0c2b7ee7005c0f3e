"""`ClassHead`: the head of a classifier, from the vector of a text or a token to the logits of the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear import LinearBase
from ..norm import Norm

__all__ = ["HEAD_ACTIVATIONS", "ClassHead"]

HEAD_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}
"""Activations between the layers of a head, by their names in Hugging Face configs."""


class ClassHead(nn.Module):
    """Two linear layers with an activation, and in some models a norm, between them.

    Args:
        dense: The first layer, `[size] -> [size]`.
        activation: A value of `HEAD_ACTIVATIONS`.
        norm: Norm after the activation; a `NoNorm` in models without one.
        out: The last layer, `[size] -> [num_labels]`.
    """

    def __init__(self, dense: LinearBase, activation: Callable[[Tensor], Tensor], norm: Norm, out: LinearBase) -> None:
        super().__init__()
        self.dense = dense
        self.activation = activation
        self.norm = norm
        self.out = out

    def forward_float32(self, vectors: Tensor) -> Tensor:
        """Returns the logits of vectors `[num_rows, size]`, `[num_rows, num_labels]` float32."""
        normed, _ = self.norm(self.activation(self.dense(vectors)), None)
        return self.out.forward_float32(normed)

"""`LayerNorm`: the norm after the pooling that models of sentence-transformers may have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CheckpointError, quote
from ..storage import Location
from .dense import read_tensors

__all__ = ["LayerNorm", "read_layer_norm"]


@dataclass(frozen=True, slots=True, eq=False)
class LayerNorm:
    """A layer norm, which the host applies to the vector of a prompt.

    Attributes:
        weight: `[size]` float32.
        bias: `[size]` float32.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        """Returns the normed vectors, `[..., size]` float32."""
        with torch.inference_mode():
            given = torch.from_numpy(vector.astype(np.float32))
            return functional.layer_norm(given, self.weight.shape, self.weight, self.bias).numpy()


def read_layer_norm(place: Location, size: int) -> LayerNorm:
    """Reads a norm.

    Args:
        place: Folder of the norm.
        size: Number of elements of the vectors before it.

    Raises:
        CheckpointError: The weights are missing or damaged, or do not fit the vectors.
    """
    tensors = read_tensors(place)
    weight, bias = tensors.get("norm.weight"), tensors.get("norm.bias")
    if weight is None or bias is None or not weight.shape == bias.shape == (size,):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise CheckpointError(
            f"{place} must hold norm.weight and norm.bias of {size} elements; it holds {quote(shapes)}"
        )
    return LayerNorm(weight.float(), bias.float())

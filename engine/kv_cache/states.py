"""States of fixed size that layers keep of a sequence: their sizes (`StateShape`), and their tensors.

A running sequence owns a row of each state tensor, the row that it owns in the runner's tables. No one clears a row: a
layer starts with zeros in the step that computes the first token of a sequence (`kernels/_states.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import lazy_zeros

__all__ = ["StateShape", "allocate_states"]


@dataclass(frozen=True, slots=True)
class StateShape:
    """What a rank keeps of each running sequence, besides the KV cache.

    Attributes:
        num_layers: Number of layers that keep states; 0 for a model without such layers.
        inputs: Shape of the last inputs of a convolution, in the dtype of the model.
        matrices: Shape of the matrices of all heads, in float32.
    """

    num_layers: int = 0
    inputs: tuple[int, ...] = ()
    matrices: tuple[int, ...] = ()

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes of the states of one sequence, in all layers, if the model computes in `dtype`."""
        sizes = math.prod(self.inputs) * dtype.itemsize + math.prod(self.matrices) * torch.float32.itemsize
        return self.num_layers * sizes


def allocate_states(
    shape: StateShape, num_rows: int, *, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Allocates the states of all layers.

    Args:
        shape: What is kept of a sequence.
        num_rows: Most running sequences.
        dtype: Number type of the model.
        device: Device of the states.

    Returns:
        For each layer the last inputs of its convolution, `[num_rows, *inputs]`, and its matrices, `[num_rows,
        *matrices]`.
    """
    inputs, matrices = (num_rows, *shape.inputs), (num_rows, *shape.matrices)
    return [
        (lazy_zeros(inputs, dtype, device), lazy_zeros(matrices, torch.float32, device))
        for _ in range(shape.num_layers)
    ]

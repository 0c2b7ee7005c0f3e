"""`InvariantLinear`: the linear layer of the deterministic mode."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import invariant_linear
from .linear import Linear, OneDnnWeight, PackedWeight, pack_for_onednn

__all__ = ["InvariantLinear"]


class InvariantLinear(Linear):
    """Computes `x W^T + b` so that each row of the result has the same bits whatever the other rows of x are."""

    def _pack(self, weight: Tensor) -> PackedWeight | None:
        """Packs the weight for oneDNN if possible, because the invariant kernel reads no other packed layout."""
        return pack_for_onednn(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[num_tokens, in_features]` to `[num_tokens, out_features]` in the same dtype."""
        return self._multiply(x, x.dtype)

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward` with a result in float32, which on a GPU is not rounded to the dtype of x in between."""
        return self._multiply(x, torch.float32)

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self._packed.packed if isinstance(self._packed, OneDnnWeight) else self.weight
        assert weight is not None
        return invariant_linear(x, weight, self.bias, dtype)

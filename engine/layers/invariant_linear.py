"""`InvariantLinear`: the linear layer of the deterministic mode."""

from __future__ import annotations

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
        weight = self._packed.packed if isinstance(self._packed, OneDnnWeight) else self.weight
        assert weight is not None
        return invariant_linear(x, weight, self.bias)

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward` and converts the result to float32."""
        return self(x).float()

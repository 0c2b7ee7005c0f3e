"""The linear layer of the deterministic mode."""

from __future__ import annotations

from torch import Tensor

from ...kernels import invariant_linear
from .linear import Linear

__all__ = ["InvariantLinear"]


class InvariantLinear(Linear):
    """Computes `x W^T + b` such that no row of the result depends, in any bit, on the other rows of x."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[num_tokens, in_features]` to `[num_tokens, out_features]` in the same dtype."""
        weight = self.weight if self._packed is None else self._packed
        assert weight is not None
        return invariant_linear(x, weight, self.bias)

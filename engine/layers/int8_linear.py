"""The linear layer of 8-bit integers, for CPUs: half the memory of bfloat16, and more products a cycle.

Weights are quantised row by row as they are loaded, so a model never needs the memory of its full precision. The
activations are quantised token by token in each product; nothing is calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import int8_linear
from ...kernels.int8_linear import can_pack_int8, pack_int8, quantize_int8
from ..parallel.shard import Dimension, as_shard
from .linear import Linear, PackedWeight
from .slots import Slot

__all__ = ["Int8Linear"]


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A weight in the panels of `kernels.int8_linear`.

    Attributes:
        packed: The panels.
        scale: Of each row.
    """

    packed: Tensor
    scale: Tensor

    def multiply(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As `PackedWeight.multiply`; rounded once."""
        return int8_linear(x, self.packed, self.scale, bias, len(self.scale), dtype)


class Int8Linear(Linear):
    """Computes `x W^T + b` from 8-bit x and W, each with a scale per row. No row depends on the other rows of x.

    Args:
        in_features: Columns of W, a multiple of 4.
        out_features: Rows of W, or the sizes of its named row blocks in order.
        bias: Whether there is a b.
        dtype: Of b, and of what goes in and out.
        device: Of W and b. Their memory is not initialised.
    """

    def __init__(
        self,
        in_features: Dimension,
        out_features: Dimension | Mapping[str, Dimension],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert self.takes(as_shard(in_features).length)
        super().__init__(in_features, out_features, bias=bias, dtype=dtype, device=device, weight_dtype=torch.int8)
        self.weight_scale: Tensor
        self.register_buffer("weight_scale", torch.empty(self._num_rows, dtype=torch.float32, device=device))

    @staticmethod
    def takes(in_features: int) -> bool:
        """Says whether a weight can have so many columns."""
        return can_pack_int8(in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[num_tokens, in_features]` to `[num_tokens, out_features]` in the same dtype."""
        return self._packed_weight().multiply(x, self.bias, x.dtype)

    def forward_float32(self, x: Tensor) -> Tensor:
        """Maps `x` as `forward` does, to float32: not rounded in between."""
        return self._packed_weight().multiply(x, self.bias, torch.float32)

    def _packed_weight(self) -> PackedWeight:
        """Returns the packed weight; before `pack` was called, one that is made for this once."""
        if self._packed is not None:
            return self._packed
        assert self.weight is not None
        return self._pack(self.weight)

    def _pack(self, weight: Tensor) -> PackedWeight:
        return Int8Weight(pack_int8(weight), self.weight_scale)

    def _slot(self, name: str, rows: slice) -> Slot:
        if name != "weight":
            return super()._slot(name, rows)
        assert self.weight is not None
        return Slot((self.weight[rows], self.weight_scale[rows]), self._quantise)

    def _quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_int8(weight.to(self.weight_scale.device))

"""The linear layer of 8-bit weights: half the memory of bfloat16, and up to twice the speed where memory is the limit.

Weights are quantised row by row as they are loaded, so a model never needs the memory of its full precision. The
activations are quantised token by token before each product; nothing is calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels import quantize_fp8, scaled_linear
from ..parallel.shard import Dimension
from .linear import Linear
from .slots import Slot

__all__ = ["Fp8Linear"]


class Fp8Linear(Linear):
    """Computes `x W^T + b` from 8-bit x and W, each with a scale per row.

    Args:
        in_features: Columns of W.
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
        super().__init__(
            in_features, out_features, bias=bias, dtype=dtype, device=device, weight_dtype=torch.float8_e4m3fn
        )
        self._dtype = dtype
        self.weight_scale: Tensor
        self.register_buffer("weight_scale", torch.empty(self._num_rows, 1, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[num_tokens, in_features]` to `[num_tokens, out_features]` in the same dtype."""
        assert self.weight is not None
        quantised, x_scale = quantize_fp8(x)
        return scaled_linear(quantised, x_scale, self.weight, self.weight_scale, self.bias, x.dtype)

    def _slot(self, name: str, rows: slice) -> Slot:
        if name != "weight":
            return super()._slot(name, rows)
        assert self.weight is not None
        return Slot((_bytes(self.weight[rows]), self.weight_scale[rows]), self._quantise)

    def _quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        quantised, scale = quantize_fp8(weight.to(self.weight_scale.device, self._dtype))
        return _bytes(quantised), scale


def _bytes(tensor: Tensor) -> Tensor:
    """Returns a view of 8-bit floats as integers, which every device can copy and compare."""
    return tensor.view(torch.uint8)

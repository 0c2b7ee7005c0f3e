"""`quantization="int8"`: weights and products of 8-bit integers, on CPUs; half the memory of bfloat16.

Weights are quantised row by row as they are loaded, so a model never needs the memory of its full precision. The
activations are quantised token by token in each product; nothing is calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ....kernels import int8_linear
from ....kernels.int8_linear import can_pack_int8, pack_int8, quantize_int8
from ...device import Device
from ...errors import ConfigError
from ...layers import Linear, PackedWeight, Slot
from ...parallel.shard import Dimension, as_shard
from ..scheme import LinearSpec, QuantizationScheme

__all__ = ["SCHEME", "Int8Linear", "Int8Scheme"]


class Int8Scheme(QuantizationScheme):
    """Stores matrices as integers with a scale per row, and multiplies in 8 bits. The sums are exact: deterministic."""

    sizes = "inputs in multiples of 4"

    def check(self, device: Device, dtype: torch.dtype) -> None:
        """Checks that the device is a CPU; every dtype of activations will do.

        Raises:
            ConfigError: The device is a GPU.
        """
        if not device.is_cpu:
            raise ConfigError(
                "quantization='int8' is for CPUs, and this engine runs on a GPU; use quantization='fp8', or "
                "device='cpu'"
            )

    def takes(self, layer: LinearSpec) -> bool:
        """Returns whether the kernel can pack so many columns."""
        return can_pack_int8(layer.num_columns)

    def make_linear(self, layer: LinearSpec) -> Int8Linear:
        """Makes a layer of 8-bit integers."""
        return Int8Linear(layer.in_features, layer.blocks, bias=layer.bias, dtype=layer.dtype, device=layer.device)


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
        assert can_pack_int8(as_shard(in_features).length)
        super().__init__(in_features, out_features, bias=bias, dtype=dtype, device=device, weight_dtype=torch.int8)
        self.weight_scale: Tensor
        self.register_buffer("weight_scale", torch.empty(self._num_rows, dtype=torch.float32, device=device))

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


SCHEME = Int8Scheme

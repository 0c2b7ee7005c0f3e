"""`Int8Scheme` (`quantization="int8"`): weights and products in 8-bit integers, on CPUs; half the memory of bfloat16.

The rows of weights are quantised while they are loaded, so a model never needs the memory of full precision. The
activations are quantised token by token in each product, so no calibration data are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ....kernels import int8_linear, quantize_int8
from ....kernels.int8_linear import can_pack_int8, pack_int8
from ...device import Device
from ...errors import ConfigError
from ...layers import Experts, ExpertsLayer, Linear, PackedWeight, WeightSlot
from ...parallel.shard import Dimension, as_shard
from ...weights.codes import QuantForm
from ..coded_experts import CodedExperts
from ..scheme import LinearSpec, QuantizationScheme

__all__ = ["SCHEME", "Int8Linear", "Int8Scheme"]


class Int8Scheme(QuantizationScheme):
    """Stores weights as 8-bit integers with one scale for each row, and quantises activations token by token.

    Products are added as 32-bit integers, so the order of addition does not change results: they are deterministic.
    """

    sizes = "inputs in multiples of 4"

    def check(self, device: Device, dtype: torch.dtype) -> None:
        """Checks that the device is a CPU; activations may have any dtype.

        Raises:
            ConfigError: The device is a GPU.
        """
        if not device.is_cpu:
            raise ConfigError(
                "quantization='int8' is for CPUs, and this engine runs on a GPU; use quantization='fp8', or "
                "device='cpu'"
            )

    def supports_sizes(self, layer: LinearSpec) -> bool:
        """Returns whether the kernel supports the number of columns of the layer's matrix: any multiple of 4."""
        return can_pack_int8(layer.num_columns)

    def make_linear(self, layer: LinearSpec) -> Int8Linear:
        """Makes a linear layer whose matrix is stored in 8-bit integers."""
        return Int8Linear(layer.in_features, layer.blocks, bias=layer.bias, dtype=layer.dtype, device=layer.device)

    def make_experts(self, layer: ExpertsLayer) -> Experts:
        """Makes experts whose matrices are quantised by row while they are loaded, and multiply plain activations."""
        form = QuantForm("int8", "int", 8)
        return CodedExperts(layer, form, form, deterministic=self.deterministic)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A weight in the panels of `kernels.int8_linear`.

    Attributes:
        packed: The panels.
        scale: Scale of each row, `[out_features]` float32.
    """

    packed: Tensor
    scale: Tensor

    def multiply(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As `PackedWeight.multiply`; the result is rounded once."""
        return int8_linear(x, self.packed, self.scale, bias, len(self.scale), dtype)


class Int8Linear(Linear):
    """Computes `x W^T + b`, where x and W are quantised to 8-bit integers with one scale for each row.

    No row of the result depends on the other rows of x.

    Args:
        in_features: Columns of W, a multiple of 4.
        out_features: Rows of W, or the sizes of its named fused parts in order.
        bias: Whether the layer has a b.
        dtype: Number type of b, x and the result.
        device: Device of W and b. Their memory is not initialised.
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
        """Computes `forward` with a result in float32, which is not rounded to the dtype of `x` in between."""
        return self._packed_weight().multiply(x, self.bias, torch.float32)

    def _packed_weight(self) -> PackedWeight:
        """Returns the weight that `pack` has packed; before `pack` was called, packs the weight for this call only."""
        if self._packed is not None:
            return self._packed
        assert self.weight is not None
        return self._pack(self.weight)

    def _pack(self, weight: Tensor) -> PackedWeight:
        return Int8Weight(pack_int8(weight), self.weight_scale)

    def _slot(self, name: str, rows: slice) -> WeightSlot:
        if name != "weight":
            return super()._slot(name, rows)
        assert self.weight is not None
        return WeightSlot((self.weight[rows], self.weight_scale[rows]), self._quantise, by_row=True)

    def _quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_int8(weight.to(self.weight_scale.device))


SCHEME = Int8Scheme

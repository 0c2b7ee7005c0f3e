"""`Int8Scheme` (`quantization="int8"`): weights and products in 8-bit integers; half the memory of bfloat16.

The rows of weights are quantised while they are loaded, so a model never needs the memory of full precision. The
activations are quantised token by token in each product, so no calibration data are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ....kernels import int8_linear, quantize_int8, scaled_int8_linear
from ....kernels.int8_linear import can_pack_int8, pack_int8
from ...device import Device
from ...layers import Experts, ExpertsLayer, Linear, LinearBase, PackedWeight, WeightSlot
from ...parallel.shard import Dimension
from ...weights.codes import Codes, InputQuant, QuantForm
from ..coded_experts import CodedExperts
from ..scheme import LinearSpec, QuantizationScheme

__all__ = ["SCHEME", "Int8Linear", "Int8Scheme"]


class Int8Scheme(QuantizationScheme):
    """Stores weights as 8-bit integers with one scale for each row, and quantises activations token by token.

    Products are added as 32-bit integers, so the order of addition does not change results: they are deterministic.
    """

    sizes = "inputs in multiples of 4"

    def check(self, device: Device, dtype: torch.dtype) -> None:
        """Accepts every device and dtype."""

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

    @classmethod
    def declines(cls, form: QuantForm, layer: LinearSpec, device: Device, *, deterministic: bool) -> str | None:
        """Takes integers with a scale for each row, and inputs of integers with a scale for each, or for all rows.

        CPUs have a kernel for a scale of each row, if they have the instruction for it.
        """
        inputs = form.inputs
        is_by_row = form.kind == "int" and form.bits == 8 and not (form.group_size or form.has_zeros or form.act_order)
        if not is_by_row or inputs is None or inputs.kind != "int" or inputs.group_size:
            return ""
        has_kernel = inputs.scale is None and torch.cpu._is_vnni_supported() and can_pack_int8(layer.num_columns)
        return None if has_kernel or not device.is_cpu else ""

    @classmethod
    def make_stored(cls, layer: LinearSpec, form: QuantForm) -> LinearBase:
        """Makes an `Int8Linear`."""
        return Int8Linear(
            layer.in_features,
            layer.blocks,
            bias=layer.bias,
            dtype=layer.dtype,
            device=layer.device,
            inputs=form.inputs,
        )


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

    No row of the result depends on the other rows of x. On a CPU the kernel that multiplies also quantises x.

    Args:
        in_features: Columns of W; on a CPU a multiple of 4, unless the scale of x is given.
        out_features: Rows of W, or the sizes of its named fused parts in order.
        bias: Whether the layer has a b.
        dtype: Number type of b, x and the result.
        device: Device of W and b. Their memory is not initialised.
        inputs: How x is quantised; None for a scale of each row.
    """

    def __init__(
        self,
        in_features: Dimension,
        out_features: Dimension | Mapping[str, Dimension],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        inputs: InputQuant | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype, device=device, weight_dtype=torch.int8)
        fixed = inputs if inputs is not None and inputs.scale is not None else None
        self._is_packed = device.type == "cpu" and fixed is None
        assert can_pack_int8(self._columns.length) or not self._is_packed
        self.weight_scale: Tensor
        self.register_buffer("weight_scale", torch.empty(self._num_rows, dtype=torch.float32, device=device))
        given = (None, None) if fixed is None else (fixed.scale, fixed.zero or None)
        self.input_scale: Tensor | None
        self.input_zero: Tensor | None
        self.full_bias: Tensor | None
        for name, number, kind in zip(("input_scale", "input_zero"), given, (torch.float32, torch.int32), strict=True):
            tensor = None if number is None else torch.full((1,), number, dtype=kind, device=device)
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("full_bias", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[num_tokens, in_features]` to `[num_tokens, out_features]` in the same dtype."""
        return self._multiply(x, x.dtype)

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward` with a result in float32, which is not rounded to the dtype of `x` in between."""
        return self._multiply(x, torch.float32)

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self._is_packed:
            return self._packed_weight().multiply(x, self.bias, dtype)
        assert self.weight is not None
        values, scales = quantize_int8(x, self.input_scale, self.input_zero)
        bias = self._full_bias() if self.full_bias is None else self.full_bias
        return scaled_int8_linear(values, scales, self.weight, self.weight_scale, bias, dtype)

    def pack(self) -> None:
        """Packs the weight for the CPU's product; on a GPU, or with a given scale, only computes the whole bias."""
        if self._is_packed:
            super().pack()
        else:
            self.full_bias = self._full_bias()

    def _full_bias(self) -> Tensor | None:
        """Returns b in float32, less what the zero point of x adds to each row of the result; None for 0."""
        bias = None if self.bias is None else self.bias.float()
        if self.input_scale is None or self.input_zero is None:
            return bias
        assert self.weight is not None
        added = self.weight.sum(1, dtype=torch.int32) * self.input_zero * (self.input_scale * self.weight_scale)
        return -added if bias is None else bias - added

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
        return WeightSlot((self.weight[rows], self.weight_scale[rows]), self._quantise, takes_codes=True, by_row=True)

    def _quantise(self, weight: Codes | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(weight, Codes):
            return weight.values, weight.scales.squeeze(1)
        return quantize_int8(weight.to(self.weight_scale.device))


SCHEME = Int8Scheme

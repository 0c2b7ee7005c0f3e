"""`Fp8Scheme` (`quantization="fp8"`): weights and products in 8-bit floats, on GPUs; half the memory of bfloat16.

The rows of weights are quantised while they are loaded, so a model never needs the memory of full precision. The
activations are quantised token by token before each product, so no calibration data are needed. Norms and gates do that
themselves where a layer of this scheme reads their result; the bits are those of a separate quantisation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from ....kernels import gate_and_mul_fp8, quantize_fp8, rms_norm_fp8, scaled_linear
from ....kernels.fp8_linear import GROUP
from ...device import Device
from ...errors import ConfigError
from ...layers import PLAIN, Experts, ExpertsLayer, InputFormat, Linear, LinearBase, Quantized, Rows, WeightSlot
from ...parallel.shard import Dimension
from ...weights.codes import Codes, QuantForm
from ..coded_experts import CodedExperts
from ..group_fp8_linear import GroupFp8Linear
from ..scheme import LinearSpec, QuantizationScheme

__all__ = ["SCHEME", "Fp8Linear", "Fp8Scheme"]

_MULTIPLE = 16
"""GPUs multiply matrices of 8-bit floats only if both sizes are multiples of this number."""


class Fp8Scheme(QuantizationScheme):
    """Stores matrices as e4m3 floats with one scale for each row, and multiplies in 8 bits.

    Of a checkpoint it takes scales of blocks of 128 columns, too. A GPU that does not multiply 8-bit floats multiplies
    plain rows by them.
    """

    sizes = f"sizes that are multiples of {_MULTIPLE}"

    def __init__(self, *, deterministic: bool = False) -> None:
        if deterministic:
            raise ConfigError(
                "quantization='fp8' and deterministic=True exclude each other: the 8-bit matrix product of a GPU may "
                "depend on the batch; drop one of the two, or use quantization='int8'"
            )
        super().__init__()

    def check(self, device: Device, dtype: torch.dtype) -> None:
        """Checks that the device can multiply 8-bit floats; activations may have any dtype.

        Raises:
            ConfigError: The device cannot multiply 8-bit floats.
        """
        if not device.supports_fp8:
            raise ConfigError(
                "quantization='fp8' needs a GPU that multiplies 8-bit floats (NVIDIA Ada, Hopper or newer), and this "
                "one does not; drop it, or store only the KV cache in 8 bits with kv_cache_dtype='fp8'"
            )

    def supports_sizes(self, layer: LinearSpec) -> bool:
        """Returns whether both sizes of the matrix are multiples of 16."""
        return layer.num_columns % _MULTIPLE == layer.num_rows % _MULTIPLE == 0

    def make_linear(self, layer: LinearSpec) -> Fp8Linear:
        """Makes a linear layer whose matrix is stored in 8-bit floats."""
        return Fp8Linear(layer.in_features, layer.blocks, bias=layer.bias, dtype=layer.dtype, device=layer.device)

    def make_experts(self, layer: ExpertsLayer) -> Experts:
        """Makes experts whose matrices are quantised by row while they are loaded, and multiply plain activations."""
        form = QuantForm("fp8", "fp8", 8)
        return CodedExperts(layer, form, form, deterministic=self.deterministic)

    @classmethod
    def declines(cls, form: QuantForm, layer: LinearSpec, device: Device, *, deterministic: bool) -> str | None:
        """Takes 8-bit floats with scales of rows or of 128 columns on GPUs, and inputs with scales of the same kind."""
        if form.kind != "fp8" or device.is_cpu:
            return ""
        if deterministic:
            return ": on a GPU the order of the sums depends on the batch, and deterministic=True forbids it"
        if form.group_size not in (0, GROUP):
            return f": there is no kernel for groups of {form.group_size} columns"
        if form.inputs is None:
            return None
        is_ours = form.inputs.kind == "fp8" and form.inputs.group_size == form.group_size
        return None if is_ours and device.supports_fp8 else ""

    @classmethod
    def make_stored(cls, layer: LinearSpec, form: QuantForm) -> LinearBase:
        """Makes an `Fp8Linear` where the library's product can be used, else a `GroupFp8Linear`."""
        is_multiple = layer.num_columns % _MULTIPLE == layer.num_rows % _MULTIPLE == 0
        if form.group_size or form.inputs is None or not is_multiple:
            return GroupFp8Linear(layer, form)
        return Fp8Linear(
            layer.in_features,
            layer.blocks,
            bias=layer.bias,
            dtype=layer.dtype,
            device=layer.device,
            input_scale=form.inputs.scale,
        )


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *, add_unit_offset: bool
) -> tuple[Quantized, Tensor]:
    values, scales, total = rms_norm_fp8(x, weight, eps, residual, add_unit_offset=add_unit_offset)
    return Quantized(values, scales), total


def _gate(x: Tensor, activation: str) -> Quantized:
    return Quantized(*gate_and_mul_fp8(x, activation))


FP8_ROWS = InputFormat(
    _rms_norm,
    {
        "gelu": functools.partial(_gate, activation="gelu"),
        "gelu_pytorch_tanh": functools.partial(_gate, activation="gelu_tanh"),
        "silu": functools.partial(_gate, activation="silu"),
    },
)
"""Rows of e4m3 floats with one scale for each row."""


class Fp8Linear(Linear):
    """Computes `x W^T + b`, where x and W are quantised to 8-bit floats with one scale for each row.

    Args:
        in_features: Columns of W.
        out_features: Rows of W, or the sizes of its named fused parts in order.
        bias: Whether the layer has a b.
        dtype: Number type of b, x and the result.
        device: Device of W and b. Their memory is not initialised.
        input_scale: The scale of all rows of x, beyond whose range numbers are clamped; None for a scale of each row.
    """

    input_format = FP8_ROWS

    def __init__(
        self,
        in_features: Dimension,
        out_features: Dimension | Mapping[str, Dimension],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        input_scale: float | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, bias=bias, dtype=dtype, device=device, weight_dtype=torch.float8_e4m3fn
        )
        self._dtype = dtype
        if input_scale is not None:
            self.input_format = PLAIN  # The kernels of norms and gates choose a scale for each row.
        fixed = None if input_scale is None else torch.full((1,), input_scale, device=device)
        self.input_scale: Tensor | None
        self.register_buffer("input_scale", fixed, persistent=False)
        self.weight_scale: Tensor
        self.register_buffer("weight_scale", torch.empty(self._num_rows, 1, dtype=torch.float32, device=device))

    def forward(self, x: Rows) -> Tensor:
        """Maps `x` `[num_tokens, in_features]` to `[num_tokens, out_features]` in the dtype of the layer.

        Rows that come from attention, or from a norm or an activation without a kernel of this format, are plain.
        """
        assert self.weight is not None
        values, scales = x if isinstance(x, Quantized) else quantize_fp8(x, self.input_scale)
        return scaled_linear(values, scales, self.weight, self.weight_scale, self.bias, self._dtype)

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward`, which is rounded to the dtype of the layer, and converts the result to float32."""
        return self(x).float()

    def _slot(self, name: str, rows: slice) -> WeightSlot:
        if name != "weight":
            return super()._slot(name, rows)
        assert self.weight is not None
        return WeightSlot(
            (_bytes(self.weight[rows]), self.weight_scale[rows]), self._quantise, takes_codes=True, by_row=True
        )

    def _quantise(self, weight: Codes | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(weight, Codes):
            return _bytes(weight.values), weight.scales
        quantised, scale = quantize_fp8(weight.to(self.weight_scale.device, self._dtype))
        return _bytes(quantised), scale


def _bytes(tensor: Tensor) -> Tensor:
    """Returns a view of 8-bit floats as integers, which every device can copy and compare."""
    return tensor.view(torch.uint8)


SCHEME = Fp8Scheme

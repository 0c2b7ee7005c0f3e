"""`GroupFp8Linear`: a linear layer of a matrix in 8-bit floats with scales of rows, or of groups of 128 columns.

It multiplies plain rows, on every GPU (W8A16), or rows in 8 bits with a scale for each group, as DeepSeek does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import fp8_linear, quantize_fp8
from ...kernels.fp8_linear import GROUP
from ..layers import LinearBase, WeightSlot
from ..weights.codes import Codes, QuantForm
from .scheme import LinearSpec

__all__ = ["GroupFp8Linear"]


class GroupFp8Linear(LinearBase):
    """Computes `x W^T + b`, where W is e4m3 numbers with a scale for each row, or for each 128 columns of a row.

    A rank's columns may begin within a group. Zeros then fill up that group, in W and in x, so that the groups of the
    rank are those of the checkpoint. A group of x that is shared by two ranks has a scale on each.

    Args:
        layer: The layer.
        form: How its matrix, and perhaps its input, are quantised.
    """

    def __init__(self, layer: LinearSpec, form: QuantForm) -> None:
        super().__init__()
        assert form.group_size in (0, GROUP)
        self._layer, self._group_size, self._quantises = layer, form.group_size or None, form.inputs is not None
        self._lead = layer.in_features.start % GROUP if form.group_size else 0
        num_rows, num_columns = sum(rows.room for rows in layer.blocks.values()), self._lead + layer.num_columns
        num_groups = -(-num_columns // GROUP) if form.group_size else 1

        def make(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
            # Zeros, not uninitialised memory: rows and columns without elements in the checkpoint stay as they are.
            zeros = torch.zeros(*shape, dtype=torch.uint8 if dtype.itemsize == 1 else dtype, device=layer.device)
            return torch.nn.Parameter(zeros.view(dtype), requires_grad=False)

        self.weight = make(num_rows, num_columns, dtype=torch.float8_e4m3fn)
        self.weight_scale = make(num_groups, num_rows, dtype=torch.float32)
        self.bias = make(num_rows, dtype=layer.dtype) if layer.bias else None
        scale = form.inputs.scale if form.inputs is not None else None
        fixed = None if scale is None else torch.full((1,), scale, device=layer.device)
        self.input_scale: Tensor | None
        self.register_buffer("input_scale", fixed, persistent=False)

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields every (name, weight slot), such as `weight`, or `gate.weight` and `up.weight` of a fused layer."""
        first = 0
        for block, rows in self._layer.blocks.items():
            prefix = f"{block}." if block else ""
            kept, padding = slice(first, first + rows.length), slice(first + rows.length, first + rows.room)
            parts = (rows, self._layer.in_features)
            unused = self._targets(padding)
            yield (
                f"{prefix}weight",
                WeightSlot(self._targets(kept), self._encode, parts=parts, padding=unused, takes_codes=True),
            )
            if self.bias is not None:
                yield f"{prefix}bias", WeightSlot((self.bias[kept],), parts=(rows,), padding=(self.bias[padding],))
            first += rows.room

    def _targets(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.weight[rows, self._lead :].view(torch.uint8), self.weight_scale.t()[rows]

    def _encode(self, weight: Codes | Tensor) -> tuple[Tensor, Tensor]:
        """Returns the contents of the targets of a weight slot, for stored codes or for a plain matrix."""
        if isinstance(weight, Codes):
            return weight.values.view(torch.uint8), weight.scales
        padded = F.pad(weight.to(self.weight.device), (self._lead, 0))
        values, scales = quantize_fp8(padded, group_size=self._group_size)
        return values[:, self._lead :].view(torch.uint8), scales

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[num_tokens, in_features]` to `[num_tokens, out_features]` in the same dtype."""
        rows, scales = F.pad(x, (self._lead, 0)) if self._lead else x, None
        if self._quantises:
            rows, scales = quantize_fp8(rows, self.input_scale, group_size=self._group_size)
        return fp8_linear(rows, scales, self.weight, self.weight_scale, self.bias, x.dtype)

"""`GroupLinear`: a linear layer whose matrix is integers of 4 or 8 bits in groups, and whose input is plain (W4A16)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels import group_linear, packed_group_embedding, packed_group_linear
from ...kernels.group_linear import GROUP_UNIT, by_groups, num_words, pack_codes, unpack_codes
from ...kernels.packed_group_linear import PackedGroups, can_pack_groups, pack_groups
from ..device import Device
from ..layers import LinearBase, WeightSlot
from ..weights.codes import Codes, QuantForm
from .rounding import round_to_groups
from .scheme import LinearSpec

__all__ = ["GroupLinear"]

BITS = (4, 8)


class GroupLinear(LinearBase):
    """Computes `x W^T + b`, where W is integers with a scale, and perhaps a zero, for each group of columns.

    If the columns of a group are not neighbours (`QuantForm.act_order`), those of W are sorted by group, and those of x
    are brought into the same order before the product.

    Args:
        layer: The layer.
        form: How its matrix is quantised.
    """

    def __init__(self, layer: LinearSpec, form: QuantForm) -> None:
        super().__init__()
        self._layer, self._bits = layer, form.bits
        self._group_size = form.group_size or layer.num_columns
        self._num_rows = num_rows = sum(rows.room for rows in layer.blocks.values())
        num_groups = layer.num_columns // self._group_size

        def make(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
            # Zeros, not uninitialised memory: rows for which a shard has room but no elements stay as they are.
            zeros = torch.zeros(*shape, dtype=dtype, device=layer.device)
            return torch.nn.Parameter(zeros, requires_grad=False)

        def make_by_groups(dtype: torch.dtype) -> torch.nn.Parameter:
            return torch.nn.Parameter(by_groups(make(num_rows, num_groups, dtype=dtype)), requires_grad=False)

        self.codes: Tensor | None = make(num_rows, num_words(layer.num_columns, form.bits), dtype=torch.int32)
        self.scales: Tensor | None = make_by_groups(form.scale_dtype)
        self.zeros: Tensor | None = make_by_groups(torch.uint8) if form.has_zeros else None
        self.order = make(layer.num_columns, dtype=torch.int64) if form.act_order else None
        self.bias = make(num_rows, dtype=layer.dtype) if layer.bias else None
        self._packed: PackedGroups | None = None  # On a CPU, from `pack` on, in the place of codes, scales and zeros.

    @staticmethod
    def declines(form: QuantForm, layer: LinearSpec, device: Device, *, deterministic: bool) -> str | None:
        """Returns why a layer cannot be made, as `QuantizationScheme.declines` does."""
        if form.kind != "int" or form.inputs is not None or form.row_block != 1:
            return ""
        if form.bits not in BITS:
            return f": there is no kernel for {form.bits} bits"
        if deterministic and not device.is_cpu:
            return ": on a GPU the order of the sums depends on the batch, and deterministic=True forbids it"
        columns, size = layer.in_features, form.group_size
        if size and (columns.start % size or columns.length % size):
            return f": the {columns.length} columns of a rank are no multiple of the groups of {size}"
        if size and size % GROUP_UNIT and not device.is_cpu:
            return f": groups of {size} columns are no multiple of {GROUP_UNIT}, as the kernel for GPUs asks"
        if form.act_order and columns.length < columns.size:
            return ": with desc_act the columns of a rank are of all groups"
        if device.is_cpu and not can_pack_groups(columns.length, size or columns.length):
            return f": groups of {size or columns.length} columns are no multiple of 16, as the kernel for CPUs asks"
        return None

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields every (name, weight slot), such as `weight`, or `gate.weight` and `up.weight` of a fused layer."""
        first = 0
        for block, rows in self._layer.blocks.items():
            prefix = f"{block}." if block else ""
            kept, padding = slice(first, first + rows.length), slice(first + rows.length, first + rows.room)
            by_row = [tensor for tensor in (self.codes, self.scales, self.zeros) if tensor is not None]
            weight = WeightSlot(
                (*(tensor[kept] for tensor in by_row), *(() if self.order is None else (self.order,))),
                self._encode,
                parts=(rows, self._layer.in_features),
                padding=tuple(tensor[padding] for tensor in by_row),
                takes_codes=True,
                by_row=self.order is None,
            )
            yield f"{prefix}weight", weight
            if self.bias is not None:
                yield f"{prefix}bias", WeightSlot((self.bias[kept],), parts=(rows,), padding=(self.bias[padding],))
            first += rows.room

    def _encode(self, weight: Codes | Tensor) -> tuple[Tensor, ...]:
        """Returns the contents of the targets of a weight slot, for stored codes or for a plain matrix."""
        assert self.codes is not None and self.scales is not None
        codes = weight
        if not isinstance(codes, Codes):
            codes = round_to_groups(codes, self._bits, self._group_size, self.scales.dtype)
        middle = 0 if codes.zeros is not None else 1 << (self._bits - 1)
        order = None if self.order is None else _order(codes)
        values = codes.values if order is None else codes.values[:, order]
        packed = pack_codes((values.to(self.codes.device, torch.int16) + middle).to(torch.uint8), self._bits)
        zeros = codes.zeros
        if self.zeros is not None and zeros is None:
            zeros = torch.full_like(codes.scales, middle)
        return tuple(part for part in (packed, codes.scales, zeros, order) if part is not None)

    def pack(self) -> None:
        """Lays the weight out for the kernel of a CPU, and drops the other layout. Does nothing on another device."""
        num_columns = self._layer.num_columns
        if self.codes is None or self.scales is None or self.codes.device.type != "cpu":
            return
        if can_pack_groups(num_columns, self._group_size):
            self._packed = pack_groups(self.codes, self.scales, self.zeros, num_columns, self._bits)
            self.codes = self.scales = self.zeros = None

    def rows(self, index: Tensor) -> Tensor:
        """Returns rows of W without its bias, dequantised to the dtype of the layer: `[len(index), in_features]`.

        Args:
            index: `[num_rows]` int64.
        """
        assert self.order is None, "StoredScheme makes no table with an order"
        if self._packed is not None:
            return packed_group_embedding(index, *self._packed, self._layer.dtype)
        assert self.codes is not None and self.scales is not None
        values = unpack_codes(self.codes[index], self._bits, self._layer.num_columns)
        zeros = 1 << (self._bits - 1) if self.zeros is None else self.zeros[index].unsqueeze(-1).float()
        groups = values.unflatten(1, (-1, self._group_size)).float()
        return ((groups - zeros) * self.scales[index].unsqueeze(-1).float()).flatten(1).to(self._layer.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[num_tokens, in_features]` to `[num_tokens, out_features]` in the same dtype."""
        return self._multiply(x, x.dtype)

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward` with a result in float32, which is not rounded to the dtype of `x` in between."""
        return self._multiply(x, torch.float32)

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x if self.order is None else x[:, self.order]
        if self._packed is not None:
            return packed_group_linear(x, *self._packed, self.bias, self._num_rows, dtype)
        assert self.codes is not None and self.scales is not None
        return group_linear(x, self.codes, self.scales, self.zeros, self.bias, bits=self._bits, dtype=dtype)


def _order(codes: Codes) -> Tensor:
    """Returns the columns sorted by group."""
    return torch.arange(codes.values.shape[1]) if codes.groups is None else codes.groups.argsort(stable=True)
